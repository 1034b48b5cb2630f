"""Keeps a key within its spend limit, with what the ledger charged for the key's jobs.

`azu:books:spent:{key id}`  hash: job id -> highest price and time, and "ended" -> charges of ended jobs.
"""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from azu.auth.key_records import ApiKey
from azu.errors import InsufficientBalance, Unauthenticated
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.transfers import Settle

# Longer than any ingress takes from here to the reservation.
_LOST_AFTER_MS = 600_000
# A key with a high limit is corrected after so many jobs too: all that are counted are added up for each job.
_CORRECTED_EVERY = 512
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
return redis.call('HLEN', KEYS[1])
"""
_END = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then
  redis.call('HINCRBY', KEYS[1], ARGV[2], ARGV[3])
end
return 1
"""


class SpendLimits:
    """Counts each job before its reservation and corrects from the ledger: no key spends above its limit."""

    def __init__(self, spending: "RedisSpending", ledger: RedisLedger) -> None:
        self._spending = spending
        self._ledger = ledger

    async def take(self, key: ApiKey, job_id: str, lamports: int, now_ms: int) -> None:
        """Count the highest price of a job against its key.

        Raises Unauthenticated for a key that has expired, InsufficientBalance (`spend_limit_reached`) if the
        key's other jobs and this one might be charged more than its limit.
        """
        if key.expires_at_ms is not None and key.expires_at_ms <= now_ms:
            raise Unauthenticated("this API key has expired; `azu login` opens another")
        if (limit := key.spend_limit_lamports) is None:
            return
        taken = CountedJob(job_id, lamports, now_ms)
        counted = await self._spending.take(key.key_id, taken, limit)
        if counted % _CORRECTED_EVERY == 0:
            await self.correct(key, now_ms)
        if not counted and not await self._spending.take(key.key_id, taken, limit):
            raise InsufficientBalance(
                f"this may take {lamports} lamports; the key's limit is {limit}",
                code="spend_limit_reached",
            )

    async def spent(self, key: ApiKey, now_ms: int) -> int:
        """Return the lamports that count against a key's limit now."""
        await self.correct(key, now_ms)
        return await self._spending.spent(key.key_id)

    async def correct(self, key: ApiKey, now_ms: int) -> None:
        """Replace the highest price of each ended job by what the job was charged."""
        for taken in await self._spending.open(key.key_id):
            charged = await self._charged(taken, now_ms)
            if charged is not None:
                await self._spending.end(key.key_id, taken.job_id, charged)

    async def give_back(self, key: ApiKey, job_id: str) -> None:
        """Take back the count of a job for which nothing was reserved."""
        if key.spend_limit_lamports is not None:
            await self._spending.end(key.key_id, job_id, 0)

    async def _charged(self, taken: "CountedJob", now_ms: int) -> int | None:
        """Return what a job was charged, None while the job is open."""
        reservation = await self._ledger.reservation(taken.job_id)
        if reservation is not None and reservation.ended_by is None:
            return None
        # A reservation that ended long ago is deleted; its end stands in the journal.
        for end in ("settle", "release", "expire"):
            if result := await self._ledger.result(f"{end}:{taken.job_id}"):
                transfer = result.entry.transfer
                return transfer.charged_lamports if isinstance(transfer, Settle) else 0
        return 0 if now_ms - taken.at_ms > _LOST_AFTER_MS else None


@dataclass(frozen=True, slots=True)
class CountedJob:
    """The most that a job may be charged to its key, and when it was counted."""

    job_id: str
    lamports: int
    at_ms: int


class RedisSpending:
    """The counts against limits in Redis; the money itself is in the ledger. Every method may be repeated."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._take = redis.register_script(_TAKE)
        self._end = redis.register_script(_END)

    async def take(self, key_id: str, taken: CountedJob, limit_lamports: int) -> int:
        """Count a job against its key; return how many are counted, 0 if this one exceeded the limit."""
        arguments: list[str | int] = [taken.job_id, taken.lamports, taken.at_ms, limit_lamports]
        return int(await self._take([_key(key_id)], arguments))

    async def open(self, key_id: str) -> list[CountedJob]:
        """Return the jobs that count with their highest price."""
        found = await cast(Awaitable[dict[str, str]], self._redis.hgetall(_key(key_id)))
        parts = ((job_id, value.split()) for job_id, value in found.items() if job_id != ENDED)
        return [CountedJob(job_id, int(lamports), int(at_ms)) for job_id, (lamports, at_ms) in parts]

    async def end(self, key_id: str, job_id: str, charged_lamports: int) -> None:
        """Count what a job was charged in place of its highest price."""
        await self._end([_key(key_id)], [job_id, ENDED, charged_lamports])

    async def spent(self, key_id: str) -> int:
        """Return what is counted against a key's limit, in lamports."""
        values = await cast(Awaitable[list[str]], self._redis.hvals(_key(key_id)))
        return sum(int(value.split()[0]) for value in values)


def _key(key_id: str) -> str:
    return f"azu:books:spent:{key_id}"
