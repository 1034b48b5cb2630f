"""The jobs of each key that may still be in flight, in Redis.

`azu:auth:flight:{key_id}`  sorted set: job id by when it was taken, in milliseconds.
"""

from collections.abc import Iterable
from typing import cast

from redis.asyncio import Redis

from azu.connection import connect_redis

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
