"""What addresses earned by the hour and the model, for lenders to see; what is paid is what the ledger says.

`azu:jobs:earned:{address}:{day}`  hash: "hour/model" -> lamports; hours and days since 1970 (UTC). finish.lua
                                   adds to it; it expires.
"""

from dataclasses import dataclass

from redis.asyncio import Redis

from azu.clock import DAY_MS
from azu.protocol.job import Receipt

EARNED = "azu:jobs:earned:"
KEPT_DAYS = 30
_HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Earned:
    """What an address earned with a model in the hour that began then."""

    at_ms: int
    model_id: str
    lamports: int


def shares_of(receipt: Receipt) -> tuple[str | int, ...]:
    """Return a job's model, then each address with what it earned, as finish.lua takes them."""
    shares = [part for one in receipt.worker_lamports.items() for part in one]
    return (receipt.model_id, *shares)


class EarnedByHour:
    """Reads what addresses earned."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def of(self, address: str, days: int, now_ms: int) -> tuple[Earned, ...]:
        """Return what an address earned in the last `days`, at most KEPT_DAYS, the latest first."""
        since_ms = now_ms - min(days, KEPT_DAYS) * DAY_MS
        async with self._redis.pipeline(transaction=False) as pipeline:
            for day in range(since_ms // DAY_MS, now_ms // DAY_MS + 1):
                pipeline.hgetall(f"{EARNED}{address}:{day}")
            found = await pipeline.execute()
        lines = [_line(name, lamports) for one in found for name, lamports in one.items()]
        recent = [line for line in lines if line.at_ms > since_ms - _HOUR_MS]
        return tuple(sorted(recent, key=lambda line: (-line.at_ms, line.model_id)))


def _line(name: str, lamports: str) -> Earned:
    hour, _, model_id = name.partition("/")
    return Earned(int(hour) * _HOUR_MS, model_id, int(lamports))
