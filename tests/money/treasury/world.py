"""A platform, payers, a real devnet and a real Redis for tests of the treasury."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.money.chain.api import ChainClient
from azu.money.chain.wallet import send_hype
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.transfers import user_available
from azu.money.treasury.deposits import DepositWatcher
from azu.money.treasury.redis import EarningsClaims, RedisCursor, RedisOutbox, RedisUncredited
from azu.money.treasury.request_reply import DepositRequests
from azu.redis_client import connect_redis
from azu.units import LAMPORTS_PER_HYPE
from tests.money.chain.running import RunningDevnet

# The seed of all randomness here; each run of a test adds its number.
SEED = 1000 * int(os.environ.get("AZU_TEST_SEED", "1"))
FUNDS = 10 * LAMPORTS_PER_HYPE


class AllClaimed:
    """Claims of earnings in which every address has claimed."""

    async def has_claimed(self, address: str) -> bool:
        return True


@dataclass(frozen=True)
class Open:
    """The treasury's parts over one set of connections."""

    chain: ChainClient
    ledger: RedisLedger
    cursor: RedisCursor
    uncredited: RedisUncredited
    deposits: DepositRequests
    outbox: RedisOutbox
    earnings_claims: EarningsClaims
    watcher: DepositWatcher
    platform: LocalAccount

    async def available(self, account: LocalAccount) -> int:
        return await self.ledger.balance(user_available(account.address.lower()))

    async def pay_platform(self, sender: LocalAccount, lamports: int) -> str:
        return await send_hype(self.chain, sender, self.platform.address, lamports)

    async def answer_deposits(self) -> None:
        """Answer deposit requests until cancelled, as the treasury's process does."""
        while True:
            await self.deposits.serve(self.watcher.check, 16)
            await asyncio.sleep(0.01)


@dataclass(frozen=True)
class World:
    devnet: RunningDevnet
    redis_url: str
    platform: LocalAccount = field(default_factory=Account.create)

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
        ledger, cursor = RedisLedger(redis), RedisCursor(redis)
        uncredited = RedisUncredited(redis)
        watcher = DepositWatcher(chain, ledger, cursor, uncredited, platform=self.platform.address.lower())
        try:
            earnings_claims = EarningsClaims(redis, self.platform.address.lower())
            deposits, outbox = DepositRequests(redis), RedisOutbox(redis)
            yield Open(
                chain, ledger, cursor, uncredited, deposits, outbox, earnings_claims, watcher, self.platform
            )
        finally:
            await chain.close()
            await redis.aclose()
