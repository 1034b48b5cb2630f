"""The limit on jobs in flight: how many jobs of one account may be queued or running at once."""

from collections.abc import Awaitable, Callable, Iterable
from typing import cast

from redis.asyncio import Redis

from azu.auth.key_records import ApiKey
from azu.errors import RateLimited
from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobState

# Longer than any ingress takes from counting a job until the job is written.
_LOST_AFTER_MS = 600_000
_RETRY_AFTER_S = 1.0
# An account that sends nothing for so long has hardly a job in flight.
_KEPT_S = 24 * 3600
_IN_FLIGHT = (JobState.QUEUED, JobState.RUNNING)
_ADD = """
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 1 end
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
"""


async def _once(_: str) -> float:
    return 1.0


class InFlightLimit:
    """Counts the jobs of each account in Redis. Every method may be called again.

    `times` says how many times as many as `limit` an account may have.

    Ended jobs stay counted until the limit is reached; only then are their states read.
    """

    def __init__(
        self, redis: Redis, jobs: RedisJobs, limit: int, times: Callable[[str], Awaitable[float]] = _once
    ) -> None:
        self._redis = redis
        self._jobs = jobs
        self._limit = limit
        self._times = times
        self._add = redis.register_script(_ADD)

    async def add(self, key: ApiKey, job_id: str, now_ms: int) -> None:
        """Count a job of a key's account; raises RateLimited (`too_many_jobs`) if it has all it may have."""
        limit = round(self._limit * await self._times(key.address))
        if await self._try_add(key, job_id, now_ms, limit):
            return
        await self._remove_ended(key, now_ms)
        if not await self._try_add(key, job_id, now_ms, limit):
            raise RateLimited(
                f"{limit} jobs of this account are in flight; wait until one has ended",
                code="too_many_jobs",
                retry_after_s=_RETRY_AFTER_S,
            )

    async def remove(self, key: ApiKey, job_id: str) -> None:
        """Stop counting a job that was not accepted."""
        await self._remove(key, [job_id])

    async def _try_add(self, key: ApiKey, job_id: str, now_ms: int, limit: int) -> bool:
        return bool(await self._add([_redis_key(key)], [job_id, now_ms, limit, _KEPT_S]))

    async def _remove_ended(self, key: ApiKey, now_ms: int) -> None:
        """Stop counting jobs that have ended, and jobs that were never written."""
        found = await self._redis.zrange(_redis_key(key), 0, -1, withscores=True)
        counted = cast(list[tuple[str, float]], found)
        states = await self._jobs.states([job_id for job_id, _ in counted])
        ended = [
            job_id
            for (job_id, added_at_ms), state in zip(counted, states, strict=True)
            if state not in _IN_FLIGHT and (state is not None or now_ms - added_at_ms > _LOST_AFTER_MS)
        ]
        await self._remove(key, ended)

    async def _remove(self, key: ApiKey, job_ids: Iterable[str]) -> None:
        if removed := list(job_ids):
            await self._redis.zrem(_redis_key(key), *removed)


def _redis_key(key: ApiKey) -> str:
    return f"azu:auth:flight:{key.address}"
