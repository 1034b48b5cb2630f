"""A network that is about to stop: new jobs are refused, and those that run may end."""

import asyncio
import time
from typing import Any, cast

from redis.asyncio import Redis

from azu.errors import Unavailable
from azu.jobs.record import QUEUE
from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobState

_DRAINING = "azu:jobs:draining"
# It is noted again at each look: a network that was not stopped after all takes jobs soon.
_NOTED_MS = 10_000
_LOOK_S = 1.0
_READ_AT_ONCE = 1000


class Draining:
    """Every ingress refuses new jobs as long as a call of `drain` runs anywhere, and some seconds longer."""

    def __init__(self, redis: Redis, jobs: RedisJobs) -> None:
        self._redis = redis
        self._jobs = jobs

    async def check(self) -> None:
        """Raise Unavailable while new jobs are refused."""
        if left_s := await self._redis.get(_DRAINING):
            raise Unavailable(
                "this network is about to stop and takes no new jobs",
                code="draining",
                retry_after_s=float(left_s),
            )

    async def drain(self, within_s: float) -> int:
        """Have new jobs refused until none runs, for `within_s` at most; return how many still run.

        What waits in the queue then, or still runs, is taken at the network's next start.
        """
        ends_s = time.monotonic() + within_s
        while True:
            left_s = max(0.0, ends_s - time.monotonic())
            # At least a second, in which the network stops.
            await self._redis.set(_DRAINING, max(1, round(left_s)), px=_NOTED_MS)
            running = await self._running()
            if not running or not left_s:
                return running
            await asyncio.sleep(min(_LOOK_S, left_s))

    async def _running(self) -> int:
        running, after = 0, "0-0"
        while True:
            found = await self._redis.xrange(QUEUE, min=f"({after}", count=_READ_AT_ONCE)
            page = cast(list[tuple[str, dict[str, Any]]], found)
            states = await self._jobs.states([fields["job"] for _, fields in page])
            running += states.count(JobState.RUNNING)
            if len(page) < _READ_AT_ONCE:
                return running
            after = page[-1][0]
