"""Limits on the rate of requests: token buckets in Redis, one number each.

`azu:auth:rate:{name}`  when the bucket is full again, in microseconds of Redis' clock; expires at that time.
"""

from dataclasses import dataclass
from importlib.resources import files

from redis.asyncio import Redis

from azu.errors import RateLimited

_MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit: `per_minute` requests in the long run, and up to `burst` requests at once after a pause."""

    per_minute: int
    burst: int

    def times(self, more: float) -> "Rate":
        """Return a limit that is so many times as high."""
        return Rate(min(round(self.per_minute * more), _MICROSECONDS * 60), round(self.burst * more))


@dataclass(frozen=True, slots=True)
class Growth:
    """How an account's limits grow with what it paid in 30 days.

    They are those of an account that paid nothing once more for each `lamports`, and at most `most` times.
    """

    lamports: int
    most: int

    def times(self, paid_lamports: int) -> float:
        """Return how many times as high the limits are as those of an account that paid nothing."""
        return min(float(self.most), 1 + paid_lamports / self.lamports)


class RedisRates:
    """Buckets by name, which all ingresses of a network share."""

    def __init__(self, redis: Redis) -> None:
        self._take = redis.register_script(files(__package__).joinpath("take_rate.lua").read_text())

    async def take(self, name: str, rate: Rate) -> None:
        """Count one request; raises RateLimited, without counting, while the bucket is empty.

        Raises Unavailable while Redis is away: a request that cannot be counted is not served.
        """
        interval_us = 60 * _MICROSECONDS // rate.per_minute
        wait_us = await self._take([f"azu:auth:rate:{name}"], [interval_us, interval_us * rate.burst])
        if wait_us > 0:
            raise RateLimited(
                f"more than {rate.per_minute} requests a minute; slow down",
                retry_after_s=wait_us / _MICROSECONDS,
            )
