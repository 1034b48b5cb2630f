"""How fast a caller may ask, in Redis: a token bucket of one number each.

`azu:auth:rate:{name}`  when the bucket is full again, in microseconds of Redis' clock; gone once it is full.
"""

from dataclasses import dataclass
from importlib.resources import files

from redis.asyncio import Redis

from azu.errors import RateLimited
from azu.redis_client import connect_redis

_MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests a minute in the long run, and so many at once after a rest."""

    per_minute: int
    burst: int


class RedisRates:
    """Buckets by name; every ingress of a network takes from the same ones."""

    def __init__(self, redis: Redis) -> None:
        self._take = redis.register_script(files(__package__).joinpath("take_rate.lua").read_text())

    @classmethod
    def from_url(cls, url: str) -> "RedisRates":
        """Return the buckets in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def take(self, name: str, rate: Rate) -> None:
        """Count one request; raises RateLimited, and counts nothing, while the bucket is empty."""
        interval_us = 60 * _MICROSECONDS // rate.per_minute
        wait_us = await self._take([f"azu:auth:rate:{name}"], [interval_us, interval_us * rate.burst])
        if wait_us > 0:
            raise RateLimited(
                f"more than {rate.per_minute} requests a minute; slow down",
                retry_after_s=wait_us / _MICROSECONDS,
            )
