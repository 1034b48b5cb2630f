"""Runs the devnet in this process."""

import socket
from collections.abc import Callable

import uvicorn

from azu.chain.devnet.app import build_app


def serve(host: str, port: int, *, seed: int | None, ready: Callable[[str], None]) -> None:
    """Serve a new chain until SIGINT or SIGTERM; calls `ready` with its URL as soon as it accepts.

    Port 0 takes a free one. Raises OSError if the port is taken.
    """
    config = uvicorn.Config(
        build_app(seed=seed),
        log_level="critical",  # faults look like errors to uvicorn
        timeout_graceful_shutdown=1,
    )
    with socket.create_server((host, port), backlog=1024) as listener:
        ready(f"http://{host}:{listener.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listener])
