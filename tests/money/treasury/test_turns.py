"""Withdrawals that wait for the signer's limit are sent in turns: the address that got least comes first."""

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.auth.signatures import Withdrawal, sign_withdrawal
from azu.devnet.chain import HYPE
from azu.money.ledger.transfers import MAX_TIME_MS
from azu.money.signer.account import PlatformAccount
from azu.money.signer.policy import PayoutLimit, SignerState, room
from azu.money.signer.views import PayoutKind, Room, TransferRequest
from azu.money.treasury.planning import PayoutSelector, Threshold, WithdrawalPlanner
from azu.money.treasury.withdrawals import LEAST_LAMPORTS, SignedWithdrawal
from tests.money.ledger import moves
from tests.money.treasury.simulated import KeySigner, NoWithdrawals, Simulation

MINUTE_MS = 60_000
STEP_MS = 10 * MINUTE_MS
# One address gets a fifth: 20 of these.
UNIT = LEAST_LAMPORTS
LIMIT = PayoutLimit(hour_lamports=100 * UNIT, day_lamports=2_400 * UNIT, address_percent=20)
SHARE = 20 * UNIT


class LimitedSigner(KeySigner):
    """A signer that fails the test when it is asked for more than its limit."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation.platform, simulation.chain.network)
        self.account = PlatformAccount(simulation.chain, (simulation.platform.address.lower(),))

    async def room(self) -> Room:
        return room(SignerState(), await self.account.view(0), PayoutKind.WITHDRAWAL, LIMIT)

    async def transfer(self, asked: TransferRequest) -> str:
        left = await self.room()
        assert asked.lamports <= left.all_lamports
        assert asked.lamports <= left.left(asked.address)
        return await super().transfer(asked)


@dataclass
class Waiting(NoWithdrawals):
    """The withdrawals that wait; the store names some first, which is no reason to send them first."""

    signed: dict[str, SignedWithdrawal] = field(default_factory=dict)
    named_first: frozenset[str] = frozenset()

    async def waiting(self) -> list[SignedWithdrawal]:
        return sorted(self.signed.values(), key=lambda one: one.withdrawal.address not in self.named_first)

    async def take_out(self, signed: SignedWithdrawal) -> None:
        del self.signed[signed.withdrawal.address]

    async def refuse(self, payout_id: str, reason: str) -> None:
        raise AssertionError(reason)


@dataclass
class Desk:
    """Users with money who ask for it back, and a treasury that sends it, step by step."""

    dice: random.Random
    simulation: Simulation = field(default_factory=lambda: Simulation(funds=10**13))
    num_asked: int = 0

    def __post_init__(self) -> None:
        self.store = Waiting()
        self.signer = self.simulation.signer = LimitedSigner(self.simulation)
        platform = self.simulation.platform.address.lower()
        parts = self.simulation.chain, self.simulation.ledger
        clock = self.simulation.clock
        selector = PayoutSelector(*parts, (platform,), Threshold(1, 1), now_ms=clock)
        self.planner = WithdrawalPlanner(
            self.store,
            self.simulation.ledger,
            self.simulation.outbox,
            selector,
            self.signer,
            platforms=(platform,),
            now_ms=clock,
        )
        self.payer = self.simulation.payer()

    def user(self) -> LocalAccount:
        account = Account.from_key(f"0x{self.dice.getrandbits(250) + 1:064x}")
        address = account.address.lower()
        self.simulation.chain.state.fund(address, HYPE, 1, self.simulation.clock())
        self.simulation.ledger._apply(moves.deposit(10**11, address=address, tx_hash=address))
        return account

    def ask(self, account: LocalAccount, lamports: int) -> None:
        """Hand a withdrawal in, unless one of the address is on its way."""
        address = account.address.lower()
        if address in self.store.signed or address in self.simulation.outbox.contents:
            return
        self.num_asked += 1
        asked = Withdrawal(
            address=address, lamports=lamports, nonce=self.num_asked, expires_at_ms=MAX_TIME_MS
        )
        signature = sign_withdrawal(account, asked, self.simulation.platform.address.lower())
        self.store.signed[address] = SignedWithdrawal(asked, signature, self.simulation.clock())

    async def step(self) -> None:
        await self.planner.plan(20, self.simulation.clock())
        # Signed and sent, then seen and booked.
        for _ in range(2):
            await self.payer.advance()
        self.simulation.clock.ms += STEP_MS

    def got(self, account: LocalAccount, since_ms: int = 0) -> int:
        rows = self.simulation.chain.state.rows[account.address.lower()]
        amounts = [row.delta["amount"] for row in rows if row.time_ms >= since_ms and "user" in row.delta]
        return round(sum(map(float, amounts)) * 10**8)


@pytest.mark.parametrize(
    ("seed", "steps"), [(0, 14), *(pytest.param(seed, 60, marks=pytest.mark.prove) for seed in (1, 2, 3))]
)
def test_one_owner_of_many_addresses_keeps_no_other_waiting(seed: int, steps: int) -> None:
    dice = random.Random(seed)
    desk = Desk(dice)

    async def scenario() -> None:
        # Together they may take more than the limit, and do so again and again.
        rich = [desk.user() for _ in range(7)]
        desk.store.named_first = frozenset(account.address.lower() for account in rich)
        asked: list[tuple[LocalAccount, int, int]] = []
        for step in range(steps):
            for account in rich:
                desk.ask(account, SHARE)
            if step % 3 == 2:
                other = desk.user(), dice.randrange(1, 21) * UNIT, desk.simulation.clock()
                desk.ask(*other[:2])
                asked.append(other)
            await desk.step()
            for account, lamports, at_ms in asked:
                if desk.simulation.clock() - at_ms > 60 * MINUTE_MS + STEP_MS:
                    assert desk.got(account) == lamports, "within the hour in which the limit is free again"
        assert sum(map(desk.got, rich)) >= steps * 10 * UNIT, "what no other asks for is theirs"

    asyncio.run(scenario())


def test_a_large_withdrawal_is_not_kept_waiting_by_smaller_ones() -> None:
    desk = Desk(random.Random(1))

    async def scenario() -> None:
        for account in [desk.user() for _ in range(5)]:
            desk.ask(account, SHARE)
        await desk.step()
        large = desk.user()
        desk.ask(large, SHARE)
        for _ in range(6):
            await desk.step()
            # Each of these alone would fit as soon as anything is free.
            desk.ask(desk.user(), UNIT)
        assert desk.got(large) == SHARE

    asyncio.run(scenario())
