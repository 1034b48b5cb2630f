"""What each key with a spend limit has spent, in Redis.

`azu:auth:spent:{key_id}`  hash: job id -> "lamports at_ms" of a job that may still be charged, and ENDED ->
                           lamports that were charged for all others.
"""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from azu.connection import connect_redis

ENDED = "ended"

# Lua's numbers are exact to 2^53 lamports, which is 90 million HYPE.
_TAKE = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 1 end
local spent = tonumber(ARGV[2])
for _, value in ipairs(redis.call('HVALS', KEYS[1])) do
  spent = spent + tonumber(string.match(value, '^%d+'))
end
if spent > tonumber(ARGV[4]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. ARGV[3])
return 1
"""
_END = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then
  redis.call('HINCRBY', KEYS[1], ARGV[2], ARGV[3])
end
return 1
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """The most that a job may be charged to its key, and when that was taken."""

    job_id: str
    lamports: int
    at_ms: int


class RedisSpending:
    """Counts against limits; the money itself is the ledger's. Every method may be called again."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._take = redis.register_script(_TAKE)
        self._end = redis.register_script(_END)

    @classmethod
    def from_url(cls, url: str) -> "RedisSpending":
        """Return what is counted in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def take(self, key_id: str, taken: Taken, limit_lamports: int) -> bool:
        """Count a job against its key; False, and nothing is counted, if that exceeded the limit."""
        arguments: list[str | int] = [taken.job_id, taken.lamports, taken.at_ms, limit_lamports]
        return bool(await self._take([_key(key_id)], arguments))

    async def open(self, key_id: str) -> list[Taken]:
        """Return the jobs that were taken and not ended."""
        found = await cast(Awaitable[dict[str, str]], self._redis.hgetall(_key(key_id)))
        parts = ((job_id, value.split()) for job_id, value in found.items() if job_id != ENDED)
        return [Taken(job_id, int(lamports), int(at_ms)) for job_id, (lamports, at_ms) in parts]

    async def end(self, key_id: str, job_id: str, charged_lamports: int) -> None:
        """Count what a job was charged in place of what it might have been."""
        await self._end([_key(key_id)], [job_id, ENDED, charged_lamports])

    async def spent(self, key_id: str) -> int:
        """Return what is counted against a key's limit, in lamports."""
        values = await cast(Awaitable[list[str]], self._redis.hvals(_key(key_id)))
        return sum(int(value.split()[0]) for value in values)


def _key(key_id: str) -> str:
    return f"azu:auth:spent:{key_id}"
