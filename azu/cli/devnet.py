"""`azu devnet`: a local chain."""

from typing import Annotated

import typer


def devnet(
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 3001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    seed: Annotated[int | None, typer.Option(help="Seed of the faults that strike at random.")] = None,
) -> None:
    """Run a local chain that speaks Hyperliquid's HTTP API; it forgets everything when it stops."""
    from azu.devnet.server import serve

    serve(host, port, seed=seed, ready=lambda url: print(f"devnet ready {url}", flush=True))  # noqa: T201
