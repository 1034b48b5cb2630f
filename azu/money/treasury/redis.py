"""The treasury's durable state in Redis: cursor, uncredited transfers, outbox, and lease."""

import secrets
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import cast

from pydantic import ConfigDict, TypeAdapter
from redis.asyncio import Redis

from azu.metrics import MetricsSnapshot
from azu.money.treasury.outbox import Payout, decode_payout, encode_payout
from azu.redis_client import typed_redis_errors

CURSOR = "azu:treasury:cursor"
OUTBOX = "azu:treasury:outbox"
LEASE = "azu:treasury:lease"
METRICS = "azu:treasury:metrics"
_METRICS_KEPT_S = 15
_SHOWN = TypeAdapter(tuple[str, list[tuple[str, tuple[str, ...], float]]])
UNCREDITED = "azu:treasury:uncredited"
_UNCREDITED_KEPT = 10_000

# Redis may run a command whose answer is lost, and the client sends the command again: each script gives the
# same answer to its own repetition. Times are milliseconds, which Lua counts exactly.
_RAISE = """
local reached = tonumber(redis.call('GET', KEYS[1]) or '0')
if tonumber(ARGV[1]) > reached then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
"""
_REPLACE = """
local found = redis.call('HGET', KEYS[1], ARGV[1])
if found == ARGV[3] then return 1 end
if found ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""
_REMOVE = """
local found = redis.call('HGET', KEYS[1], ARGV[1])
if found and found ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
"""
_HOLD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""


class RedisMetrics:
    """The counters and gauges of the treasury, which runs outside of Ray; they expire after its end.

    A process shows them under a name that is used only once.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def show(self, source: str, snapshot: MetricsSnapshot) -> None:
        """Replace what is shown."""
        values = [(name, labels, value) for (name, labels), value in snapshot.values.items()]
        with typed_redis_errors():
            await self._redis.set(METRICS, _SHOWN.dump_json((source, values)), ex=_METRICS_KEPT_S)

    async def read(self) -> tuple[str, MetricsSnapshot] | None:
        """Return the name of the process and what it shows; None if there is none."""
        with typed_redis_errors():
            shown = await self._redis.get(METRICS)
        if shown is None:
            return None
        source, values = _SHOWN.validate_json(shown)
        return source, MetricsSnapshot({(name, labels): value for name, labels, value in values}, {})


class RedisCursor:
    """How far the platform's ledger on the chain was read."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._raise = redis.register_script(_RAISE)

    async def read(self) -> int:
        """Return the chain's time in ms up to which every row is decided; 0 before the first read."""
        with typed_redis_errors():
            return int(await self._redis.get(CURSOR) or 0)

    async def advance(self, time_ms: int) -> None:
        """Move the cursor forward; an earlier time, from a process with an old view, changes nothing."""
        with typed_redis_errors():
            await self._raise([CURSOR], [time_ms])


@dataclass(frozen=True, slots=True)
class Uncredited:
    """A transfer to the platform that was credited to no account, and why; `amount` is the chain's string.

    `row` tells it from all others.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    time_ms: int
    hash: str
    sender: str
    token_name: str
    amount: str
    reason: str
    row: str = ""


_UNCREDITED = TypeAdapter(Uncredited)


class RedisUncredited:
    """The latest transfers that were credited to no account, in the order of the chain's time."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def add(self, transfer: Uncredited) -> bool:
        """Write a transfer; return False if it is written already."""
        with typed_redis_errors():
            async with self._redis.pipeline() as pipeline:
                pipeline.zadd(UNCREDITED, {_UNCREDITED.dump_json(transfer): transfer.time_ms}, nx=True)
                pipeline.zremrangebyrank(UNCREDITED, 0, -1 - _UNCREDITED_KEPT)
                added, _ = await pipeline.execute()
        return bool(added)

    async def all(self) -> tuple[Uncredited, ...]:
        """Return the transfers, the newest first."""
        with typed_redis_errors():
            found = cast(list[str], await self._redis.zrevrange(UNCREDITED, 0, -1))
        return tuple(map(_UNCREDITED.validate_json, found))


class RedisOutbox:
    """The open payouts: a hash of address -> payout. A write compares the stored payout with the one read."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._replace = redis.register_script(_REPLACE)
        self._remove = redis.register_script(_REMOVE)

    async def open(self) -> tuple[Payout, ...]:
        """Return all open payouts, the oldest first."""
        with typed_redis_errors():
            contents = await cast(Awaitable[list[str]], self._redis.hvals(OUTBOX))
        payouts = (decode_payout(content) for content in contents)
        return tuple(sorted(payouts, key=lambda payout: (payout.planned_at_ms, payout.payout_id)))

    async def add(self, payout: Payout) -> bool:
        """Write a new payout; return False if its address has another one open."""
        content = encode_payout(payout)
        with typed_redis_errors():
            if await self._redis.hsetnx(OUTBOX, payout.address, content):
                return True
            return await cast(Awaitable[str | None], self._redis.hget(OUTBOX, payout.address)) == content

    async def replace(self, old: Payout, new: Payout) -> bool:
        """Write the next state; return False if the stored payout is not `old` (any more)."""
        assert old.address == new.address
        states = [encode_payout(old), encode_payout(new)]
        with typed_redis_errors():
            return bool(await self._replace([OUTBOX], [old.address, *states]))

    async def remove(self, payout: Payout) -> bool:
        """Close a payout; return False if the stored payout is another one (by now)."""
        with typed_redis_errors():
            return bool(await self._remove([OUTBOX], [payout.address, encode_payout(payout)]))


class RedisLease:
    """The right to pay, for one process at a time: the holder has to renew it within `ttl_ms`."""

    def __init__(self, redis: Redis, *, ttl_ms: int) -> None:
        self._token = secrets.token_hex(16)
        self._ttl_ms = ttl_ms
        self._hold = redis.register_script(_HOLD)
        self._release = redis.register_script(_RELEASE)

    async def hold(self) -> bool:
        """Take or renew the lease; return False while another process has it."""
        with typed_redis_errors():
            return bool(await self._hold([LEASE], [self._token, self._ttl_ms]))

    async def release(self) -> None:
        """Give the lease back if it is held."""
        with typed_redis_errors():
            await self._release([LEASE], [self._token])
