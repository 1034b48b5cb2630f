"""The single writer over a real Redis and a folder of seals, closed at the end of the test."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from azu.money.ledger.entry import Result
from azu.money.ledger.journal import RedisJournal
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.seals import Seals
from azu.money.ledger.transfers import Transfer

NOW_MS = 1_800_000_000_000


@asynccontextmanager
async def open_books(
    url: str, folder: Path, now_ms: Callable[[], int] = lambda: NOW_MS
) -> AsyncIterator[Ledger]:
    ledger = await Ledger.open(RedisJournal.from_url(url), Seals(folder), now_ms)
    try:
        yield ledger
    finally:
        await ledger.close()


def with_books(url: str, folder: Path, scenario: Callable[[Ledger], Awaitable[None]]) -> None:
    async def run() -> None:
        async with open_books(url, folder) as ledger:
            await scenario(ledger)

    asyncio.run(run())


async def apply_each(ledger: Ledger, *transfers: Transfer) -> list[Result]:
    return [await ledger.apply(transfer) for transfer in transfers]
