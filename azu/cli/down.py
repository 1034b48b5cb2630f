"""`azu down`: stop the network that `azu up` runs on this machine."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from azu.cli.output import console, done

if TYPE_CHECKING:
    from azu.config import Settings

_TIMEOUT_S = 60.0

Drain = Annotated[bool, typer.Option("--drain", help="Refuse new jobs first, and let those that run end.")]
DrainOnly = Annotated[bool, typer.Option("--drain-only", help="Do the same, and stop nothing.")]
Within = Annotated[float, typer.Option(min=0, help="How many seconds they may take when it drains.")]


def down(drain: Drain = False, drain_only: DrainOnly = False, within: Within = 300.0) -> None:
    """Stop the network that runs out of AZU_HOME, and everything that it started.

    Jobs that wait or still run are taken at its next start.
    """
    from azu.config import Settings
    from azu.launch.network_process import running_network, stop_network

    settings = Settings.from_environment()
    running_network(settings.home)
    if drain or drain_only:
        with console.status("Waiting for the jobs that run"):
            running = _drain(settings, within)
        if running:
            console.print(Text(f"{running} jobs still run; they go on at the next start", "yellow"))
    if drain_only:
        return
    with console.status(f"Stopping the network in {settings.home}"):
        stop_network(settings.home, _TIMEOUT_S)
    console.print(done("stopped"))


def _drain(settings: "Settings", within_s: float) -> int:
    import asyncio

    from azu.jobs.draining import Draining
    from azu.jobs.redis import RedisJobs
    from azu.launch.redis_server import JOB_STORE, own_redis_url
    from azu.redis_client import connect_redis

    async def drained() -> int:
        redis = connect_redis(settings.redis_url or own_redis_url(settings.jobs_home, JOB_STORE))
        try:
            return await Draining(redis, RedisJobs(redis)).drain(within_s)
        finally:
            await redis.aclose()

    return asyncio.run(drained())
