"""Limits on the rate of requests: token buckets in Redis, one number each.

`azu:auth:rate:{name}`  when the bucket is full again, in microseconds of Redis' clock; expires at that time.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import TypeVar

from redis.asyncio import Redis

from azu.auth.key_records import secret_digest
from azu.auth.peers import network_of
from azu.errors import RateLimited, Unauthenticated

_MICROSECONDS = 1_000_000
_KEPT_GOOD = 10_000
_Judged = TypeVar("_Judged")


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit: `per_minute` requests in the long run, and up to `burst` requests at once after a pause."""

    per_minute: int
    burst: int

    def times(self, more: float) -> "Rate":
        """Return a limit that is so many times as high."""
        return Rate(min(round(self.per_minute * more), _MICROSECONDS * 60), round(self.burst * more))


# Wrong keys from one address.
_WRONG = Rate(per_minute=30, burst=60)


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

    async def take(self, name: str, rate: Rate, *, what: str = "requests", looks: bool = False) -> None:
        """Count one request; raises RateLimited, without counting, while the bucket is empty.

        With `looks` nothing is counted. Raises Unavailable while Redis is away: a request that cannot be
        counted is not served.
        """
        interval_us = 60 * _MICROSECONDS // rate.per_minute
        wait_us = await self._take(
            [f"azu:auth:rate:{name}"], [interval_us, interval_us * rate.burst, int(not looks)]
        )
        if wait_us > 0:
            raise RateLimited(
                f"more than {rate.per_minute} {what} a minute; slow down",
                retry_after_s=wait_us / _MICROSECONDS,
            )


class WrongKeys:
    """Bounds how many wrong keys an address may try; keys that were good here lately are never refused."""

    def __init__(self, rates: RedisRates) -> None:
        self._rates = rates
        self._good: OrderedDict[str, None] = OrderedDict()  # SHA-256 of the latest ones

    def note_good(self, digest: str) -> None:
        """Note a key that is good by its SHA-256, in hex."""
        self._good[digest] = None
        self._good.move_to_end(digest)
        while len(self._good) > _KEPT_GOOD:
            self._good.popitem(last=False)

    async def judged(self, secret: str, address: str, judge: Callable[[str], Awaitable[_Judged]]) -> _Judged:
        """Return what `judge` says of a secret that came from an address; it raises Unauthenticated.

        Raises RateLimited, without asking, for a secret that may be a guess once the address sent too many
        wrong ones: an answer would tell which guess is right.
        """
        digest, name = secret_digest(secret), f"wrong:{network_of(address)}"
        if digest not in self._good:
            await self._rates.take(name, _WRONG, what="wrong keys", looks=True)
        try:
            judged = await judge(secret)
        except Unauthenticated:
            self._good.pop(digest, None)
            if secret:
                await self._rates.take(name, _WRONG, what="wrong keys")
            raise
        self.note_good(digest)
        return judged
