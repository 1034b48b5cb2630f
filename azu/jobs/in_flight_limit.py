"""Keeps the jobs that a key has in flight within a limit; how they ended is looked up when it is reached."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast

from redis.asyncio import Redis

from azu.auth.api_keys import ApiKey
from azu.errors import RateLimited
from azu.protocol.job import JobState
from azu.redis_client import connect_redis

# Longer than any ingress takes from here until the job is written down.
_LOST_AFTER_MS = 600_000
_RETRY_AFTER_S = 1.0
_IN_FLIGHT = (JobState.QUEUED, JobState.RUNNING)


class InFlightJobs(Protocol):
    """The jobs of each key that may be in flight."""

    async def take(self, key_id: str, job_id: str, at_ms: int, limit: int) -> bool:
        """Note a job; False if the key has `limit` others."""

    async def noted(self, key_id: str) -> Mapping[str, int]:
        """Return the noted jobs and when they were taken."""

    async def end(self, key_id: str, job_ids: Iterable[str]) -> None:
        """Forget jobs."""


class States(Protocol):
    """Durable jobs."""

    async def states(self, job_ids: Sequence[str]) -> Sequence[JobState | None]:
        """Return how far jobs are; None for one that is not written down."""


class FlightLimits:
    """At most `limit` jobs of a key are queued or running at once."""

    def __init__(self, flights: InFlightJobs, jobs: States, limit: int) -> None:
        self._flights = flights
        self._jobs = jobs
        self._limit = limit

    async def take(self, key: ApiKey, job_id: str, now_ms: int) -> None:
        """Note a job of a key; raises RateLimited (`too_many_jobs`) if too many others are in flight."""
        if await self._flights.take(key.key_id, job_id, now_ms, self._limit):
            return
        noted = await self._flights.noted(key.key_id)
        states = await self._jobs.states(list(noted))
        ended = [
            noted_id
            for (noted_id, at_ms), state in zip(noted.items(), states, strict=True)
            if state not in _IN_FLIGHT and (state is not None or now_ms - at_ms > _LOST_AFTER_MS)
        ]
        await self._flights.end(key.key_id, ended)
        if not await self._flights.take(key.key_id, job_id, now_ms, self._limit):
            raise RateLimited(
                f"{self._limit} jobs of this key are in flight; wait until one has ended",
                code="too_many_jobs",
                retry_after_s=_RETRY_AFTER_S,
            )

    async def give_back(self, key: ApiKey, job_id: str) -> None:
        """Forget a job that was not accepted."""
        await self._flights.end(key.key_id, [job_id])


_TAKE = """
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 1 end
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
return 1
"""


class RedisFlights:
    """Job ids by key. Every method may be called again."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._take = redis.register_script(_TAKE)

    @classmethod
    def from_url(cls, url: str) -> "RedisFlights":
        """Return what is kept in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def take(self, key_id: str, job_id: str, at_ms: int, limit: int) -> bool:
        """Note a job of a key; False, and nothing is noted, if the key has `limit` others."""
        return bool(await self._take([_key(key_id)], [job_id, at_ms, limit]))

    async def noted(self, key_id: str) -> dict[str, int]:
        """Return the jobs that were taken and not ended, and when."""
        found = await self._redis.zrange(_key(key_id), 0, -1, withscores=True)
        return {job_id: int(at_ms) for job_id, at_ms in cast(list[tuple[str, float]], found)}

    async def end(self, key_id: str, job_ids: Iterable[str]) -> None:
        """Forget jobs that are not in flight."""
        if ended := list(job_ids):
            await self._redis.zrem(_key(key_id), *ended)


def _key(key_id: str) -> str:
    return f"azu:auth:flight:{key_id}"
