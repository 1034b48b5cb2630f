"""Settlements per second on a Redis that flushes each one, beside bare writes to the same Redis."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

from azu.cli.bench.results import Figure
from azu.cli.network.children import Children
from azu.cli.network.redis_server import start_redis, wait_for_redis
from azu.connection import connect_redis
from azu.engine.reference import ModelShape
from azu.ledger.redis import RedisLedger
from azu.ledger.transfers import Deposit, Reserve, Settle

_JOBS = 2000
# Taken in turns, so that whatever else the machine does slows both.
_ROUNDS = 20
_AT_ONCE = 32
_START_TIMEOUT_S = 30.0
_USER = f"0x{1:040x}"
_WORKERS = tuple(f"0x{number:040x}" for number in (2, 3))
_CHARGED = 1000
_EXPIRES_AT_MS = 2**50


def measure(_shape: ModelShape) -> tuple[Figure, ...]:
    """Return the speed of settling jobs of two workers each."""
    with tempfile.TemporaryDirectory(prefix="azu-bench-") as folder, Children(Path(folder)) as children:
        server = start_redis(children, Path(folder) / "redis")
        wait_for_redis(children, server, _START_TIMEOUT_S)
        settled_s, written_s = asyncio.run(_measure(server.urls.owner))
    return (
        Figure(
            name="settlements on a flushing Redis",
            unit="per s",
            value=_JOBS / settled_s,
            reference=_JOBS / written_s,
            reference_name="bare SET, flushed",
            at_least=0.3,
            notes={"at once": _AT_ONCE},
        ),
    )


async def _measure(url: str) -> tuple[float, float]:
    ledger, redis = RedisLedger.from_url(url), connect_redis(url)
    try:
        await ledger.apply(Deposit(id="deposit", address=_USER, lamports=_JOBS * _CHARGED))
        await _all(range(_JOBS), lambda job: ledger.apply(_reserve(job)))
        settled_s = written_s = 0.0
        for start in range(_ROUNDS):
            jobs = range(start, _JOBS, _ROUNDS)
            written_s += await _all(jobs, lambda job: redis.set(f"bench:{job}", "x" * 100))
            settled_s += await _all(jobs, lambda job: ledger.apply(_settle(job)))
        return settled_s, written_s
    finally:
        await ledger.close()
        await redis.aclose()


def _reserve(job: int) -> Reserve:
    return Reserve(
        id=f"reserve:{job}",
        address=_USER,
        job_id=str(job),
        lamports=_CHARGED,
        expires_at_ms=_EXPIRES_AT_MS,
    )


def _settle(job: int) -> Settle:
    platform = _CHARGED // 5
    share = (_CHARGED - platform) // len(_WORKERS)
    return Settle(
        id=f"settle:{job}",
        job_id=str(job),
        charged_lamports=_CHARGED,
        platform_lamports=platform,
        shares=dict.fromkeys(_WORKERS, share),
    )


async def _all(jobs: Iterable[int], call: Callable[[int], Awaitable[object]]) -> float:
    """Make the call for every job, so many at once; return the seconds it took."""

    async def work(waiting: Iterator[int]) -> None:
        for job in waiting:
            await call(job)

    waiting, started = iter(jobs), time.perf_counter()
    await asyncio.gather(*(work(waiting) for _ in range(_AT_ONCE)))
    return time.perf_counter() - started
