"""`azu devnet`: a local chain."""

from pathlib import Path
from typing import Annotated

import typer


def devnet(
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 3001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    file: Annotated[Path | None, typer.Option(help="Where the chain is kept.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the faults that strike at random.")] = None,
) -> None:
    """Run a local chain that speaks Hyperliquid's HTTP API; without a file it forgets all when it stops."""
    from azu.devnet.server import serve

    serve(host, port, seed=seed, file=file, ready=lambda url: print(f"devnet ready {url}", flush=True))  # noqa: T201
