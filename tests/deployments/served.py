"""The local ingress behind a real HTTP server, for clients that need one."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from tests.deployments.local import LocalIngress, local_ingress, unhurried

_PATIENCE_S = 300


@dataclass
class Served:
    """An ingress behind a real HTTP server, and one user of it."""

    url: str
    api_key: str
    address: str
    ingress: LocalIngress
    loop: asyncio.AbstractEventLoop
    statuses: Counter[int] = field(default_factory=Counter)

    def money(self) -> tuple[int, ...]:
        """Return the user's available and reserved lamports."""
        asked = asyncio.run_coroutine_threadsafe(self.ingress.money(self.address), self.loop)
        return asked.result(_PATIENCE_S)[:2]


@contextmanager
def served(redis_url: str, home: Path) -> Iterator[Served]:
    """Serve an ingress in its own thread."""
    ready, done = threading.Event(), asyncio.Event()
    found: list[Served] = []

    async def serve() -> None:
        async with local_ingress(redis_url, home, unhurried()) as ingress:
            server = uvicorn.Server(
                uvicorn.Config(
                    ingress.app,
                    port=0,
                    log_level="error",
                    lifespan="off",
                    ws="none",
                    timeout_graceful_shutdown=5,
                )
            )
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            address, api_key = await ingress.user()
            url = f"http://127.0.0.1:{port}"
            found.append(Served(url, api_key, address, ingress, asyncio.get_running_loop()))
            ready.set()
            await done.wait()
            server.should_exit = True
            await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(_PATIENCE_S)
    try:
        yield found[0]
    finally:
        found[0].loop.call_soon_threadsafe(done.set)
        thread.join(_PATIENCE_S)
