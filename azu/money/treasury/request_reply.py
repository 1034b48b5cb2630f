"""Requests that the ingress puts to the treasury through Redis, and the treasury's replies.

Any number of callers with one question share one request, and a reply is kept for a while.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import cast

from pydantic import TypeAdapter
from redis.asyncio import Redis

from azu.addresses import parse_address, parse_hash
from azu.errors import (
    DeadlineExceeded,
    DepositRejected,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    RateLimited,
    Unavailable,
)
from azu.redis_client import typed_redis_errors
from azu.supervision import AWAY, as_known_error


class CreditState(StrEnum):
    """PENDING: good, but not in the platform's ledger yet. REJECTED: will never be credited.

    BUSY: not looked for, because too many were.
    """

    UNKNOWN = "unknown"
    BUSY = "busy"
    PENDING = "pending"
    CREDITED = "credited"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class DepositStatus:
    """What the treasury knows of a hash. `sender` is the chain's, empty while the hash is unknown."""

    state: CreditState
    sender: str = ""
    lamports: int = 0
    reason: str = ""


# How many requests may wait at once, and how long one waits for a treasury that is away.
_MAX_WAITING = 10_000
_WAIT_S = 60
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.4
# Less than a call of Redis may take.
_WAKES_S = 2
# A request that failed this often is answered with the error; only such a reply begins with the mark.
_MOST_FAULTS = 3
_FAULT_MARK = "!"

_DEPOSITS_TOPIC = "claims"
# A reply that may change soon is asked for again after this long.
_PASSING_REPLY_MS = 1000
_FINAL_REPLY_MS = 60_000
# The explorer may learn of a hash a little later than the caller.
_UNKNOWN_TIMEOUT_S = 3.0
# What was not looked for is asked for again after this long.
_BUSY_S = 60.0
_FINAL = (CreditState.CREDITED, CreditState.REJECTED)
_STATUS = TypeAdapter(DepositStatus)

# Returns the reply if there is one; else the request waits (once) and wakes the treasury, unless too many do.
_ASK = """
local answer = redis.call('GET', KEYS[2])
if answer then return answer end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[3])
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[4]) then return 'full' end
if redis.call('ZADD', KEYS[1], 'NX', ARGV[2], ARGV[1]) == 1 then
    redis.call('LPUSH', KEYS[3], 1)
    redis.call('LTRIM', KEYS[3], 0, 0)
end
return false
"""


class DepositRequests:
    """Both ends: the ingress asks what became of a deposit, the treasury answers.

    Every method raises Unavailable when Redis does not answer, `ask` InternalError when the treasury failed.
    """

    def __init__(self, redis: Redis) -> None:
        self._topic = RequestReply(redis, _DEPOSITS_TOPIC)

    async def ask(self, tx_sig: str, address: str, timeout_s: float) -> DepositStatus:
        """Have the treasury look for a transfer of an address and credit it; return CREDITED or PENDING.

        A pending deposit has 0 lamports and is credited later without another request. Raises InvalidRequest
        for a malformed hash or address, NotFound for a hash that the chain does not know, Forbidden if
        another address sent the transfer, DepositRejected if it is no deposit of HYPE to the platform,
        DeadlineExceeded if the treasury does not answer in `timeout_s`, Unavailable if too many wait,
        RateLimited if too many were looked for.
        """
        tx_hash, claimant = parse_hash(tx_sig), parse_address(address, param="user_address")
        seen: DepositStatus | None = None
        async for waited_s, reply in self._topic.ask(tx_hash):
            seen = _STATUS.validate_json(reply) if reply else seen
            limit_s = timeout_s
            if seen is not None and seen.state is CreditState.UNKNOWN:
                limit_s = min(timeout_s, _UNKNOWN_TIMEOUT_S)
            if (seen is not None and seen.state in (*_FINAL, CreditState.BUSY)) or waited_s >= limit_s:
                break
        return _checked_status(seen, tx_hash, claimant)

    async def wait(self) -> None:
        """Wait until a request is there, for two seconds at most."""
        await self._topic.wait()

    async def serve(self, check: Callable[[str], Awaitable[DepositStatus]], limit: int) -> int:
        """Answer the oldest requests with what `check` says of a hash; return how many there were."""

        async def answer(tx_hash: str) -> None:
            try:
                parse_hash(tx_hash)
            except InvalidRequest:
                await self._topic.drop(tx_hash)
                return
            status = await check(tx_hash)
            kept_ms = _FINAL_REPLY_MS if status.state in _FINAL else _PASSING_REPLY_MS
            await self._topic.answer(tx_hash, _STATUS.dump_json(status), kept_ms)

        return await self._topic.serve(answer, limit)


def _checked_status(seen: DepositStatus | None, tx_hash: str, claimant: str) -> DepositStatus:
    if seen is None:
        raise DeadlineExceeded("the treasury did not answer; the deposit is credited when it is back")
    if seen.state is CreditState.BUSY:
        raise RateLimited(
            "too many transfers were looked for; a deposit is credited also if no one asks for it",
            retry_after_s=_BUSY_S,
        )
    if seen.state is CreditState.UNKNOWN:
        raise NotFound(f"the chain does not know {tx_hash}", param="tx_sig")
    if seen.sender != claimant:
        raise Forbidden("another address sent this transfer", param="user_address")
    if seen.state is CreditState.REJECTED:
        raise DepositRejected(f"{tx_hash} is no deposit: {seen.reason}", param="tx_sig")
    return seen if seen.state is CreditState.CREDITED else replace(seen, lamports=0)


class RequestReply:
    """Both ends of one topic; every method raises Unavailable when Redis does not answer.

    `azu:treasury:{topic}:waiting`            sorted set of requests by the time they were first made.
    `azu:treasury:{topic}:answer:{request}`   a reply; expires.
    `azu:treasury:{topic}:bell`               a list that has an element once a request came.
    """

    def __init__(self, redis: Redis, topic: str) -> None:
        self._redis = redis
        self._topic = topic
        self._waiting = f"azu:treasury:{topic}:waiting"
        self._bell = f"azu:treasury:{topic}:bell"
        self._ask_script = redis.register_script(_ASK)
        self._faults: Counter[str] = Counter()

    async def ask(self, request: str) -> AsyncIterator[tuple[float, str | None]]:
        """Ask again and again; yield the seconds since the first time, and the reply if there is one.

        Raises Unavailable if too many requests wait, InternalError if the treasury failed to answer.
        """
        started, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            reply = await self._ask(request)
            yield time.monotonic() - started, reply
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)

    async def serve(self, answer: Callable[[str], Awaitable[None]], limit: int) -> int:
        """Have the oldest requests answered at once; the third fault of a request is its answer.

        Returns how many there were. Raises the error of a service that is away; its request stays.
        """
        waiting = await self.waiting(limit)
        outcomes = await asyncio.gather(*map(answer, waiting), return_exceptions=True)
        for request, outcome in zip(waiting, outcomes, strict=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, AWAY):
                await self._failed(request, outcome)
            elif outcome is None:
                del self._faults[request]
        for outcome in outcomes:
            if isinstance(outcome, AWAY) or not isinstance(outcome, Exception | None):
                raise outcome
        return len(waiting)

    async def wait(self) -> None:
        """Wait until a request is there, for two seconds at most."""
        if not await self.waiting(1):
            with typed_redis_errors():
                await self._redis.blpop([self._bell], timeout=_WAKES_S)

    async def _failed(self, request: str, error: Exception) -> None:
        known = as_known_error(error, f"a request among {self._topic}")
        self._faults[request] += 1
        if self._faults[request] >= _MOST_FAULTS:
            await self.answer(request, _FAULT_MARK + known.message, _PASSING_REPLY_MS)
            del self._faults[request]

    async def waiting(self, limit: int) -> list[str]:
        """Return requests without a reply, the oldest first; they stay until they are answered.

        Those that are dated in the future, or were not asked for again in time, are removed.
        """
        now_s = time.time()
        with typed_redis_errors():
            async with self._redis.pipeline(transaction=False) as look:
                look.zremrangebyscore(self._waiting, f"({now_s + _WAIT_S}", "+inf")
                look.zremrangebyscore(self._waiting, "-inf", f"({now_s - _WAIT_S}")
                look.zrange(self._waiting, 0, limit - 1)
                return cast(list[str], (await look.execute())[-1])

    async def drop(self, request: str) -> None:
        """Remove a request that no one can answer."""
        with typed_redis_errors():
            await self._redis.zrem(self._waiting, request)

    async def answer(self, request: str, reply: str | bytes, kept_ms: int) -> None:
        """Answer every caller with this request, from now on for `kept_ms`."""
        with typed_redis_errors():
            async with self._redis.pipeline(transaction=True) as write:
                write.set(self._reply_key(request), reply, px=kept_ms)
                write.zrem(self._waiting, request)
                await write.execute()

    async def _ask(self, request: str) -> str | None:
        now_s = time.time()
        with typed_redis_errors():
            reply = await self._ask_script(
                [self._waiting, self._reply_key(request), self._bell],
                [request, now_s, now_s - _WAIT_S, _MAX_WAITING],
            )
        if reply == "full":
            raise Unavailable(f"too many {self._topic} wait for the treasury")
        reply = cast(str | None, reply)
        if reply is not None and reply.startswith(_FAULT_MARK):
            raise InternalError(reply.removeprefix(_FAULT_MARK))
        return reply

    def _reply_key(self, request: str) -> str:
        return f"azu:treasury:{self._topic}:answer:{request}"
