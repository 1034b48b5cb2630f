"""Claims: how the ingress makes the treasury look for a deposit at once.

A claim carries a hash and nothing else: what the caller says is a hint where to look, and the answer is
what the chain says. Any number of claims of one hash are one look.
"""

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from pydantic import TypeAdapter
from redis.asyncio import Redis

from azu.chain.identifiers import parse_address, parse_hash
from azu.connection import connect_redis
from azu.errors import DeadlineExceeded, DepositRejected, Forbidden, NotFound, Unavailable
from azu.treasury.deposits import Sighting, SightingState
from azu.treasury.errors import typed_redis_errors

WAITING = "azu:treasury:claims:waiting"
_ANSWER = "azu:treasury:claims:answer:"
# How many hashes may wait at once, and how long one waits for a treasury that is away.
_MAX_WAITING = 10_000
_WAIT_S = 60
# An answer that may change soon is asked for again after this long.
_PASSING_ANSWER_MS = 1000
_FINAL_ANSWER_MS = 60_000
# The explorer may learn of a hash a little later than the caller.
_UNKNOWN_PATIENCE_S = 3.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.4

_FINAL = (SightingState.CREDITED, SightingState.REJECTED)
_SIGHTING = TypeAdapter(Sighting)

# The answer if there is one; else the hash waits (once), unless too many do.
_ASK = """
local answer = redis.call('GET', KEYS[2])
if answer then return answer end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[3])
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[4]) then return 'full' end
redis.call('ZADD', KEYS[1], 'NX', ARGV[2], ARGV[1])
return false
"""


class ClaimStatus(StrEnum):
    """PENDING: the chain has it, azu's ledger not yet; it will come without another claim."""

    CREDITED = "credited"
    PENDING = "pending"


@dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """What a claim of one's own deposit is told; `lamports` is 0 while it is pending."""

    status: ClaimStatus
    lamports: int


class RedisClaims:
    """Both ends of the claims: the ingress asks, the treasury answers.

    Every method raises Unavailable when Redis does not answer.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._ask_script = redis.register_script(_ASK)

    @classmethod
    def from_url(cls, url: str) -> "RedisClaims":
        """Return the claims kept in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def ask(self, tx_sig: str, address: str, timeout_s: float) -> ClaimVerdict:
        """Have the treasury look for a hash and say what became of it, for the address that claims it.

        Raises InvalidRequest for a malformed hash or address, NotFound for a hash the chain does not know,
        Forbidden if another address sent it, DepositRejected if it is no deposit of HYPE to the platform,
        DeadlineExceeded if the treasury does not answer in `timeout_s`, Unavailable if too many claims wait.
        """
        tx_hash, claimant = parse_hash(tx_sig), parse_address(address, param="user_address")
        started, pause_s, seen = time.monotonic(), _FIRST_PAUSE_S, None
        while True:
            seen = await self._ask(tx_hash) or seen
            waited_s = time.monotonic() - started
            patience_s = timeout_s
            if seen is not None and seen.state is SightingState.UNKNOWN:
                patience_s = min(timeout_s, _UNKNOWN_PATIENCE_S)
            if (seen is not None and seen.state in _FINAL) or waited_s >= patience_s:
                return _verdict(seen, tx_hash, claimant)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)

    async def waiting(self, limit: int) -> list[str]:
        """Return hashes that somebody waits for, the oldest first; they wait on until they are answered."""
        with typed_redis_errors():
            return cast(list[str], await self._redis.zrange(WAITING, 0, limit - 1))

    async def answer(self, tx_hash: str, sighting: Sighting) -> None:
        """Answer everybody who waits for a hash."""
        kept_ms = _FINAL_ANSWER_MS if sighting.state in _FINAL else _PASSING_ANSWER_MS
        with typed_redis_errors():
            async with self._redis.pipeline(transaction=True) as write:
                write.set(_ANSWER + tx_hash, _SIGHTING.dump_json(sighting), px=kept_ms)
                write.zrem(WAITING, tx_hash)
                await write.execute()

    async def _ask(self, tx_hash: str) -> Sighting | None:
        now_s = time.time()
        with typed_redis_errors():
            answer = await self._ask_script(
                [WAITING, _ANSWER + tx_hash], [tx_hash, now_s, now_s - _WAIT_S, _MAX_WAITING]
            )
        if answer == "full":
            raise Unavailable("too many claims are waiting for the treasury")
        return _SIGHTING.validate_json(answer) if answer else None


def _verdict(seen: Sighting | None, tx_hash: str, claimant: str) -> ClaimVerdict:
    if seen is None:
        raise DeadlineExceeded("the treasury did not answer; the deposit is credited when it is back")
    if seen.state is SightingState.UNKNOWN:
        raise NotFound(f"the chain does not know {tx_hash}", param="tx_sig")
    if seen.sender != claimant:
        raise Forbidden("another address sent this transfer", param="user_address")
    if seen.state is SightingState.REJECTED:
        raise DepositRejected(f"{tx_hash} is no deposit: {seen.reason}", param="tx_sig")
    if seen.state is SightingState.CREDITED:
        return ClaimVerdict(ClaimStatus.CREDITED, seen.lamports)
    return ClaimVerdict(ClaimStatus.PENDING, 0)
