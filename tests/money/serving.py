"""The books served as their process serves them, in a test's own loop or in a thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from azu.money.bookkeeping import ALLOWED, Bookkeeper
from azu.money.books import BooksCalls
from azu.money.wire import Access, WireServer

# A caller for tests, which may make every call.
TESTER = "tester"
_ALL = frozenset().union(*ALLOWED.values())


@dataclass
class ServedBooks:
    """The books in the Redis at a URL; they can be stopped and started again at their port."""

    redis_url: str
    platform: str
    access: Access

    async def start(self) -> None:
        self._bookkeeper = Bookkeeper.from_url(self.redis_url, self.platform)
        allowed = {**ALLOWED, TESTER: _ALL}
        self._server = WireServer(BooksCalls, self._bookkeeper, self.access.secrets, allowed)
        self.access = Access(await self._server.start(self.access.port), self.access.secrets)

    async def stop(self) -> None:
        await self._server.close()
        await self._bookkeeper.close()


@asynccontextmanager
async def serving(redis_url: str, platform: str = "") -> AsyncIterator[ServedBooks]:
    """Serve the books until the block ends."""
    books = ServedBooks(redis_url, platform, Access.new(0, [*ALLOWED, TESTER]))
    await books.start()
    try:
        yield books
    finally:
        await books.stop()


@contextmanager
def served(redis_url: str, platform: str = "") -> Iterator[Access]:
    """Serve them from a thread, for a test that runs no loop of its own."""
    found: list[Access] = []
    is_up, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serving(redis_url, platform) as books:
            found.append(books.access)
            is_up.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert is_up.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
