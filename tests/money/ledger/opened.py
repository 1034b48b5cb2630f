"""A ledger over a real Redis, closed at the end of the test."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.rules import Result
from azu.money.ledger.transfers import Transfer


@asynccontextmanager
async def open_ledger(url: str) -> AsyncIterator[RedisLedger]:
    ledger = RedisLedger.from_url(url)
    try:
        yield ledger
    finally:
        await ledger.close()


def with_ledger(url: str, scenario: Callable[[RedisLedger], Awaitable[None]]) -> None:
    async def run() -> None:
        async with open_ledger(url) as ledger:
            await scenario(ledger)

    asyncio.run(run())


async def apply_all(ledger: RedisLedger, *transfers: Transfer) -> list[Result]:
    return [await ledger.apply(transfer) for transfer in transfers]
