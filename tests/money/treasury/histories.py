"""Money that moves in every direction at once, and what must hold when all of it has arrived."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.auth.signatures import Withdrawal, sign_claim, sign_withdrawal
from azu.clock import wall_clock_ms
from azu.money.ledger.transfers import worker_paid
from azu.money.treasury.request_reply import CreditState
from azu.money.treasury.withdrawals import LEAST_LAMPORTS, RedisWithdrawals, SignedWithdrawal, WithdrawalState
from azu.redis_client import connect_redis
from azu.units import lamports_from_hype
from tests.killing import Death
from tests.money.ledger import moves
from tests.money.treasury.dying import Treasury
from tests.money.treasury.world import Open, World

COMMISSION_LAMPORTS = 1_000
# What the platform's wallet holds above what it owes.
FLOAT_LAMPORTS = 10**9
PATIENCE_S = 60.0


@dataclass
class History:
    """A deposit is requested, a worker is owed, one user withdraws, another tries to.

    `prepare` books what happened before and makes all requests to the treasury; `is_over` returns whether the
    treasury has done everything.
    """

    world: World
    parts: Open
    withdrawals: RedisWithdrawals
    client: LocalAccount
    payer: LocalAccount
    owner: LocalAccount
    withdrawer: LocalAccount
    overdrawer: LocalAccount
    deposited: int
    earned: int
    withdrawn: int

    @property
    def treasury(self) -> Treasury:
        """The treasury of this platform, ready to start."""
        world = self.world
        return Treasury(
            world.redis_url,
            self.parts.books.access.url("treasury"),
            self.parts.signer.access.url("treasury"),
            world.devnet.url,
            world.platform.address.lower(),
            LEAST_LAMPORTS,
        )

    async def prepare(self) -> list[asyncio.Task[object]]:
        """Return the requests that wait for the treasury: for the deposit."""
        owner, platform = self.owner.address.lower(), self.world.platform.address.lower()
        charged = self.earned + COMMISSION_LAMPORTS
        await self.parts.deposit(self.client, charged)
        await self.parts.deposit(self.withdrawer, self.withdrawn)
        user = self.client.address.lower()
        await self.parts.book(
            moves.open_key(user),
            moves.reserve("job-1", charged, address=user),
            replace(
                moves.settle("job-1", charged),
                platform_lamports=COMMISSION_LAMPORTS,
                shares={owner: self.earned},
            ),
        )
        self.world.devnet.fund(platform, FLOAT_LAMPORTS)
        await self.parts.ledger.claim_earnings(owner, sign_claim(self.owner, platform))
        for account, lamports in ((self.withdrawer, self.withdrawn), (self.overdrawer, LEAST_LAMPORTS)):
            await self.withdrawals.hand_in(self._asked(account, lamports))
        tx_hash = await self.parts.pay_platform(self.payer, self.deposited)
        return [asyncio.create_task(self._claim(tx_hash))]

    async def is_over(self) -> bool:
        """Whether everything has arrived."""
        balances = await self.parts.balances()
        return (
            await self._state(self.withdrawer) is WithdrawalState.PAID
            and await self._state(self.overdrawer) is WithdrawalState.REFUSED
            and balances.get(worker_paid(self.owner.address.lower())) == self.earned
            and await self.parts.available(self.payer) == self.deposited
            and await self.parts.outbox.open() == ()
            and await self.withdrawals.waiting() == []
        )

    async def check(self) -> None:
        """By the books, by the chain and by both together, nothing was lost, paid twice or stuck."""
        assert self._received(self.owner) == [self.earned]
        assert self._received(self.withdrawer) == [self.withdrawn]
        assert self._received(self.overdrawer) == []
        wallet = await self.parts.chain.spot_balance(self.world.platform.address.lower()) - FLOAT_LAMPORTS
        report = await self.parts.ledger.audit(wallet)
        assert report.agrees, report.findings
        assert (report.in_flight_lamports, report.in_transit_lamports) == (0, 0)
        assert report.revenue_lamports == COMMISSION_LAMPORTS
        assert report.liabilities_lamports == self.deposited

    def _asked(self, account: LocalAccount, lamports: int) -> SignedWithdrawal:
        address, platform = account.address.lower(), self.world.platform.address.lower()
        asked = Withdrawal(
            address=address, lamports=lamports, nonce=1, expires_at_ms=wall_clock_ms() + 600_000
        )
        return SignedWithdrawal(asked, sign_withdrawal(account, asked, platform))

    async def _claim(self, tx_hash: str) -> None:
        verdict = await self.parts.deposits.ask(tx_hash, self.payer.address, PATIENCE_S)
        assert (verdict.state, verdict.lamports) == (CreditState.CREDITED, self.deposited)

    async def _state(self, account: LocalAccount) -> WithdrawalState:
        return (await self.parts.ledger.withdrawal(account.address.lower(), 1)).state

    def _received(self, account: LocalAccount) -> list[int]:
        """Return what the chain's ledger shows of the platform's payments to an account."""
        rows = self.world.devnet.info("userNonFundingLedgerUpdates", account.address.lower(), startTime=0)
        platform = self.world.platform.address.lower()
        # A fault of this devnet shows a row twice.
        mine = {row["hash"]: row["delta"] for row in rows if row["delta"].get("user") == platform}
        return [lamports_from_hype(delta["amount"]) for delta in mine.values()]


@asynccontextmanager
async def history(world: World, dice: random.Random) -> AsyncIterator[History]:
    """Make a history of random amounts between new accounts, in an empty Redis."""
    redis = connect_redis(world.redis_url)
    await redis.flushdb()
    try:
        async with world.open() as parts:
            yield History(
                world,
                parts,
                RedisWithdrawals(redis),
                client=world.payer(),
                payer=world.payer(),
                owner=Account.create(),
                withdrawer=world.payer(),
                overdrawer=world.payer(),
                deposited=dice.randrange(1, LEAST_LAMPORTS),
                earned=dice.randrange(LEAST_LAMPORTS, 10 * LEAST_LAMPORTS),
                withdrawn=dice.randrange(LEAST_LAMPORTS, 10 * LEAST_LAMPORTS),
            )
    finally:
        await redis.aclose()


async def play(world: World, dice: random.Random, death: Death) -> bool:
    """Play a history with a treasury that dies and a second one after it; return whether the first died."""
    async with history(world, dice) as played:
        requests = await played.prepare()
        running = [played.treasury.start(death)]
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not await played.is_over():
                assert time.monotonic() < deadline, f"{death}: something did not arrive"
                if len(running) == 1 and not running[0].is_alive():
                    running.append(played.treasury.start())
                await asyncio.sleep(0.02)
            await asyncio.gather(*requests)
            await played.check()
            # The last write comes after the last effect that can be seen.
            await asyncio.to_thread(running[0].join, 0.1)
            return not running[0].is_alive()
        finally:
            for process in running:
                process.kill()
                process.join(10)
