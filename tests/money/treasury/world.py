"""A platform, payers, a real devnet and a real Redis for tests of the treasury."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.auth.network_id import Succession
from azu.auth.succession import platforms_of
from azu.errors import Unavailable
from azu.money.books import Books, BooksTerms
from azu.money.chain.api import ChainClient
from azu.money.chain.wallet import send_hype
from azu.money.ledger.transfers import Transfer
from azu.money.treasury.deposits import DepositWatcher
from azu.money.treasury.redis import RedisCursor, RedisOutbox, RedisUncredited
from azu.money.treasury.request_reply import DepositRequests
from azu.redis_client import connect_redis
from azu.units import LAMPORTS_PER_HYPE
from tests.money.chain.running import RunningDevnet
from tests.money.serving import TERMS, ServedBooks, serving
from tests.money.signer.serving import ServedSigner, signing

# The seed of all randomness here; each run of a test adds its number.
SEED = 1000 * int(os.environ.get("AZU_TEST_SEED", "1"))
FUNDS = 10 * LAMPORTS_PER_HYPE


@dataclass(frozen=True)
class Open:
    """The treasury's parts over one set of connections."""

    chain: ChainClient
    books: ServedBooks
    ledger: Books
    cursor: RedisCursor
    uncredited: RedisUncredited
    deposits: DepositRequests
    outbox: RedisOutbox
    watcher: DepositWatcher
    platform: LocalAccount
    signer: ServedSigner

    async def available(self, account: LocalAccount) -> int:
        return (await self.ledger.balance(account.address.lower())).available_lamports

    async def book(self, *transfers: Transfer) -> None:
        """Apply transfers of any kind, as the books do it themselves."""
        core = await self.books.bookkeeper.ledger()
        for transfer in transfers:
            await core.apply(transfer)

    async def balances(self) -> dict[str, int]:
        """Return all accounts' lamports."""
        return dict((await self.books.bookkeeper.ledger()).state.balances)

    async def pay_platform(self, sender: LocalAccount, lamports: int) -> str:
        return await send_hype(self.chain, sender, self.platform.address, lamports)

    async def deposit(self, sender: LocalAccount, lamports: int) -> None:
        """Have an account deposit, and the deposit be credited."""
        tx_hash = await self.pay_platform(sender, lamports)
        while True:
            # A busy machine, or a fault of the chain, may take longer than a call waits.
            with suppress(Unavailable):
                await self.watcher.poll()
                if await self.ledger.result(f"deposit:{tx_hash}") is not None:
                    return
            await asyncio.sleep(0.02)

    async def answer_deposits(self) -> None:
        """Answer deposit requests until cancelled, as the treasury's process does."""
        while True:
            await self.deposits.wait()
            await self.deposits.serve(self.watcher.check, 16)
            await asyncio.sleep(0.01)


@dataclass(frozen=True)
class World:
    devnet: RunningDevnet
    redis_url: str
    platform: LocalAccount = field(default_factory=Account.create)
    folder: Path | None = None
    terms: BooksTerms = TERMS
    # Between two looks of its signer.
    look_s: float = 0.2
    # Which key of the platform replaced which.
    successions: tuple[Succession, ...] = ()

    @property
    def former(self) -> tuple[str, ...]:
        """The addresses that the platform had before."""
        return platforms_of(self.platform.address.lower(), self.successions)[1:]

    def payer(self, lamports: int = FUNDS) -> LocalAccount:
        account = Account.create()
        self.devnet.fund(account.address, lamports)
        return account

    def run(self, scenario: Callable[[Open], Coroutine[Any, Any, None]]) -> None:
        """Run a scenario with everything open."""

        async def inside() -> None:
            async with self.open() as parts:
                await scenario(parts)

        asyncio.run(inside())

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Open]:
        redis = connect_redis(self.redis_url)
        chain = ChainClient(self.devnet.network)
        platform, former = self.platform.address.lower(), self.former
        async with serving(
            self.redis_url, self.folder, platform=platform, terms=self.terms, successions=self.successions
        ) as books:
            ledger, cursor, uncredited = books.client(), RedisCursor(redis), RedisUncredited(redis)
            watcher = DepositWatcher(chain, ledger, cursor, uncredited, platform=platform, former=former)
            deposits, outbox = DepositRequests(redis), RedisOutbox(redis)
            try:
                async with signing(
                    self.platform, self.devnet.network, books, look_s=self.look_s, former=former
                ) as signer:
                    yield Open(
                        chain,
                        books,
                        ledger,
                        cursor,
                        uncredited,
                        deposits,
                        outbox,
                        watcher,
                        self.platform,
                        signer,
                    )
            finally:
                await ledger.close()
                await chain.close()
                await redis.aclose()
