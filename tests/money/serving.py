"""The books served as their process serves them, in a test's own loop or in a thread."""

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from azu.auth.network_id import Succession
from azu.clock import wall_clock_ms
from azu.money.bookkeeping import Bookkeeper
from azu.money.books import Books, BooksCalls, BooksTerms
from azu.money.books_process import ALLOWED
from azu.money.receipts import ReceiptKey
from azu.money.wire import Access, WireServer

# A caller for tests, which may make every call.
TESTER = "tester"
PLATFORM = "0x" + "99" * 20
TERMS = BooksTerms(
    lamports_per_token_layer=2,
    platform_percent=20,
    reservation_ttl_ms=600_000,
    max_keys=100,
    max_nodes=100,
    max_unfunded_keys=1_000,
    unfunded_key_ms=86_400_000,
)
_ALL = frozenset().union(*ALLOWED.values())


@dataclass
class ServedBooks:
    """The books in the Redis at a URL; they can be stopped and started again at their port."""

    redis_url: str
    folder: Path
    platform: str = PLATFORM
    terms: BooksTerms = TERMS
    successions: tuple[Succession, ...] = ()
    receipts: ReceiptKey | None = None
    now_ms: Callable[[], int] = wall_clock_ms
    hears: Callable[[int], None] | None = None
    access: Access = field(default_factory=lambda: Access.new(0, [*ALLOWED, TESTER]))

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.bookkeeper = Bookkeeper(
            self.redis_url,
            self.folder,
            self.platform,
            self.terms,
            successions=self.successions,
            receipts=self.receipts,
            now_ms=self.now_ms,
            hears=self.hears,
        )
        await self.bookkeeper.note_successions()
        allowed = {**ALLOWED, TESTER: _ALL}
        self._server = WireServer(BooksCalls, self.bookkeeper, self.access.secrets, allowed)
        self.access = Access(await self._server.start(self.access.port), self.access.secrets)

    async def stop(self) -> None:
        await self._server.close()
        await self.bookkeeper.close()

    def client(self, caller: str = TESTER) -> Books:
        return Books(self.access.url(caller))


@asynccontextmanager
async def serving(redis_url: str, folder: Path | None = None, **given: object) -> AsyncIterator[ServedBooks]:
    """Serve the books until the block ends; without a `folder` they remember nothing of it."""
    with tempfile.TemporaryDirectory() as passing:
        books = ServedBooks(redis_url, folder or Path(passing), **given)  # type: ignore[arg-type]
        await books.start()
        try:
            yield books
        finally:
            await books.stop()


@contextmanager
def served(redis_url: str, **given: object) -> Iterator[ServedBooks]:
    """Serve them from a thread, for a test that runs no loop of its own."""
    found: list[ServedBooks] = []
    is_up, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serving(redis_url, **given) as books:
            found.append(books)
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
