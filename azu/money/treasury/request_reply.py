"""Questions that the ingress puts to the treasury through Redis, and the answers.

Any number of askers of one question are one question, and an answer is kept for a while.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import cast

from pydantic import TypeAdapter
from redis.asyncio import Redis

from azu.addresses import parse_address, parse_hash
from azu.errors import DeadlineExceeded, DepositRejected, Forbidden, NotFound, Unavailable
from azu.money.treasury.deposits import DepositState, DepositStatus
from azu.redis_client import connect_redis, typed_redis_errors

# How many questions may wait at once, and how long one waits for a treasury that is away.
_MAX_WAITING = 10_000
_WAIT_S = 60
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.4

# The answer if there is one; else the question waits (once), unless too many do.
_ASK = """
local answer = redis.call('GET', KEYS[2])
if answer then return answer end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[3])
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[4]) then return 'full' end
redis.call('ZADD', KEYS[1], 'NX', ARGV[2], ARGV[1])
return false
"""


class RequestReply:
    """Both ends of one topic's questions; every method raises Unavailable when Redis does not answer.

    `azu:treasury:{topic}:waiting`            sorted set of questions by the time they were first asked.
    `azu:treasury:{topic}:answer:{question}`  an answer; expires.
    """

    def __init__(self, redis: Redis, topic: str) -> None:
        self._redis = redis
        self._topic = topic
        self._waiting = f"azu:treasury:{topic}:waiting"
        self._ask_script = redis.register_script(_ASK)

    async def asked(self, question: str) -> AsyncIterator[tuple[float, str | None]]:
        """Ask again and again; yield the seconds since the first time, and the answer if there is one.

        Raises Unavailable if too many questions wait.
        """
        started, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            answer = await self._ask(question)
            yield time.monotonic() - started, answer
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)

    async def waiting(self, limit: int) -> list[str]:
        """Return questions without an answer, the oldest first; they wait on until they are answered."""
        with typed_redis_errors():
            return cast(list[str], await self._redis.zrange(self._waiting, 0, limit - 1))

    async def answer(self, question: str, answer: str | bytes, kept_ms: int) -> None:
        """Answer everybody who asks, from now on for `kept_ms`."""
        with typed_redis_errors():
            async with self._redis.pipeline(transaction=True) as write:
                write.set(self._answer_key(question), answer, px=kept_ms)
                write.zrem(self._waiting, question)
                await write.execute()

    async def _ask(self, question: str) -> str | None:
        now_s = time.time()
        with typed_redis_errors():
            answer = await self._ask_script(
                [self._waiting, self._answer_key(question)], [question, now_s, now_s - _WAIT_S, _MAX_WAITING]
            )
        if answer == "full":
            raise Unavailable(f"too many {self._topic} are waiting for the treasury")
        return cast(str | None, answer)

    def _answer_key(self, question: str) -> str:
        return f"azu:treasury:{self._topic}:answer:{question}"


_CLAIMS_TOPIC = "claims"
# An answer that may change soon is asked for again after this long.
_PASSING_ANSWER_MS = 1000
_FINAL_ANSWER_MS = 60_000
# The explorer may learn of a hash a little later than the caller.
_UNKNOWN_PATIENCE_S = 3.0

_FINAL = (DepositState.CREDITED, DepositState.REJECTED)
_SIGHTING = TypeAdapter(DepositStatus)


class DepositRequests:
    """Both ends of the claims: the ingress asks, the treasury answers.

    Every method raises Unavailable when Redis does not answer.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._questions = RequestReply(redis, _CLAIMS_TOPIC)

    @classmethod
    def from_url(cls, url: str) -> "DepositRequests":
        """Return the claims kept in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def ask(self, tx_sig: str, address: str, timeout_s: float) -> DepositStatus:
        """Have the treasury look for a hash and say what became of it, for the address that claims it.

        Raises InvalidRequest for a malformed hash or address, NotFound for a hash the chain does not know,
        Forbidden if another address sent it, DepositRejected if it is no deposit of HYPE to the platform,
        DeadlineExceeded if the treasury does not answer in `timeout_s`, Unavailable if too many claims wait.
        """
        tx_hash, claimant = parse_hash(tx_sig), parse_address(address, param="user_address")
        seen: DepositStatus | None = None
        async for waited_s, answer in self._questions.asked(tx_hash):
            seen = _SIGHTING.validate_json(answer) if answer else seen
            patience_s = timeout_s
            if seen is not None and seen.state is DepositState.UNKNOWN:
                patience_s = min(timeout_s, _UNKNOWN_PATIENCE_S)
            if (seen is not None and seen.state in _FINAL) or waited_s >= patience_s:
                break
        return _verdict(seen, tx_hash, claimant)

    async def waiting(self, limit: int) -> list[str]:
        """Return hashes that somebody waits for, the oldest first; they wait on until they are answered."""
        return await self._questions.waiting(limit)

    async def answer(self, tx_hash: str, sighting: DepositStatus) -> None:
        """Answer everybody who waits for a hash."""
        kept_ms = _FINAL_ANSWER_MS if sighting.state in _FINAL else _PASSING_ANSWER_MS
        await self._questions.answer(tx_hash, _SIGHTING.dump_json(sighting), kept_ms)


def _verdict(seen: DepositStatus | None, tx_hash: str, claimant: str) -> DepositStatus:
    if seen is None:
        raise DeadlineExceeded("the treasury did not answer; the deposit is credited when it is back")
    if seen.state is DepositState.UNKNOWN:
        raise NotFound(f"the chain does not know {tx_hash}", param="tx_sig")
    if seen.sender != claimant:
        raise Forbidden("another address sent this transfer", param="user_address")
    if seen.state is DepositState.REJECTED:
        raise DepositRejected(f"{tx_hash} is no deposit: {seen.reason}", param="tx_sig")
    return seen if seen.state is DepositState.CREDITED else replace(seen, lamports=0)


_RECEIPTS_TOPIC = "receipts"
_KEPT_MS = 3_600_000
# A job that has not ended, or that the ledger contradicts, may be asked for again after this long.
_REFUSAL_KEPT_MS = 1_000


class ReceiptRequests:
    """Both ends: the ingress asks for a job's signature, the treasury gives it.

    Every method raises Unavailable when Redis does not answer.
    """

    def __init__(self, redis: Redis) -> None:
        self._questions = RequestReply(redis, _RECEIPTS_TOPIC)

    @classmethod
    def from_url(cls, url: str) -> "ReceiptRequests":
        """Return the receipts asked for in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def ask(self, job_id: str, timeout_s: float) -> str | None:
        """Return the platform's signature of an ended job's receipt.

        None if the treasury does not answer in `timeout_s`, or does not stand by the receipt.
        """
        async for waited_s, signature in self._questions.asked(job_id):
            if signature is not None or waited_s >= timeout_s:
                return signature or None
        raise AssertionError("it is asked until the timeout")

    async def waiting(self, limit: int) -> list[str]:
        """Return jobs whose receipts are waited for, the oldest question first."""
        return await self._questions.waiting(limit)

    async def answer(self, job_id: str, signature: str) -> None:
        """Answer everybody who waits for a job's signature; empty for none."""
        await self._questions.answer(job_id, signature, _KEPT_MS if signature else _REFUSAL_KEPT_MS)
