"""Claims: how the ingress makes the treasury look for a deposit at once.

A claim carries a hash and nothing else: what the caller says is a hint where to look, and the answer is
what the chain says. Any number of claims of one hash are one look.
"""

from dataclasses import dataclass
from enum import StrEnum

from pydantic import TypeAdapter
from redis.asyncio import Redis

from azu.chain.identifiers import parse_address, parse_hash
from azu.connection import connect_redis
from azu.errors import DeadlineExceeded, DepositRejected, Forbidden, NotFound
from azu.treasury.deposits import Sighting, SightingState
from azu.treasury.questions import RedisQuestions

_TOPIC = "claims"
# An answer that may change soon is asked for again after this long.
_PASSING_ANSWER_MS = 1000
_FINAL_ANSWER_MS = 60_000
# The explorer may learn of a hash a little later than the caller.
_UNKNOWN_PATIENCE_S = 3.0

_FINAL = (SightingState.CREDITED, SightingState.REJECTED)
_SIGHTING = TypeAdapter(Sighting)


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
        self._questions = RedisQuestions(redis, _TOPIC)

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
        seen: Sighting | None = None
        async for waited_s, answer in self._questions.asked(tx_hash):
            seen = _SIGHTING.validate_json(answer) if answer else seen
            patience_s = timeout_s
            if seen is not None and seen.state is SightingState.UNKNOWN:
                patience_s = min(timeout_s, _UNKNOWN_PATIENCE_S)
            if (seen is not None and seen.state in _FINAL) or waited_s >= patience_s:
                break
        return _verdict(seen, tx_hash, claimant)

    async def waiting(self, limit: int) -> list[str]:
        """Return hashes that somebody waits for, the oldest first; they wait on until they are answered."""
        return await self._questions.waiting(limit)

    async def answer(self, tx_hash: str, sighting: Sighting) -> None:
        """Answer everybody who waits for a hash."""
        kept_ms = _FINAL_ANSWER_MS if sighting.state in _FINAL else _PASSING_ANSWER_MS
        await self._questions.answer(tx_hash, _SIGHTING.dump_json(sighting), kept_ms)


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
