"""Signed withdrawals: how they reach the treasury, and how far each has come. Payouts carry them out."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from pydantic import ConfigDict, TypeAdapter
from redis.asyncio import Redis

from azu.auth.signatures import Withdrawal, withdrawal_id
from azu.errors import Conflict, NotFound, Unavailable
from azu.money.ledger.entry import Result
from azu.redis_client import typed_redis_errors

# The chain removes balances below 0.01 HYPE.
LEAST_LAMPORTS = 1_000_000
# The most withdrawals that wait for the treasury at once.
_MAX_WAITING = 10_000
_REFUSAL_KEPT_S = 30 * 86_400
_WAITING = "azu:treasury:withdrawals:waiting"
_REFUSED = "azu:treasury:withdrawals:refused:"
# Only the same withdrawal: another one of its address may wait by now.
_TAKE_OUT = """
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 1
"""


class WithdrawalState(StrEnum):
    """WAITING for the treasury; SENDING: set aside and on its way; PAID and REFUSED are final."""

    WAITING = "waiting"
    SENDING = "sending"
    PAID = "paid"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class WithdrawalStatus:
    """How far a withdrawal has come; `reason` says why it was refused."""

    state: WithdrawalState
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SignedWithdrawal:
    """A withdrawal, its address's signature, and when the books took it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    withdrawal: Withdrawal
    signature: str
    asked_at_ms: int = 0


_SIGNED = TypeAdapter(SignedWithdrawal)


class RedisWithdrawals:
    """Both ends: the ingress hands signed withdrawals in, the treasury takes them out.

    At most one withdrawal of an address waits, so that no address delays the others. Every method raises
    Unavailable when Redis does not answer, and may be called again.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._take_out = redis.register_script(_TAKE_OUT)

    async def hand_in(self, signed: SignedWithdrawal) -> None:
        """Write a withdrawal for the treasury.

        Raises Conflict while another withdrawal of its address waits, Unavailable if too many wait.
        """
        content, address = _encoded(signed), signed.withdrawal.address
        with typed_redis_errors():
            if await self._redis.hlen(_WAITING) >= _MAX_WAITING:
                raise Unavailable("too many withdrawals wait for the treasury")
            if await self._redis.hsetnx(_WAITING, address, content):
                return
        found = await self._waiting_of(address)
        if found is not None and found.withdrawal != signed.withdrawal:
            raise Conflict("another withdrawal of this address waits for the treasury", param="nonce")

    async def waiting(self) -> list[SignedWithdrawal]:
        """Return the withdrawals that were handed in and not taken out yet."""
        with typed_redis_errors():
            contents = await cast(Awaitable[list[str]], self._redis.hvals(_WAITING))
        return [_SIGNED.validate_json(content) for content in contents]

    async def take_out(self, signed: SignedWithdrawal) -> None:
        """Remove a withdrawal from the waiting ones."""
        with typed_redis_errors():
            await self._take_out([_WAITING], [signed.withdrawal.address, _encoded(signed)])

    async def refuse(self, payout_id: str, reason: str) -> None:
        """Write why a withdrawal will never be carried out."""
        with typed_redis_errors():
            await self._redis.set(_REFUSED + payout_id, reason, ex=_REFUSAL_KEPT_S)

    async def refusal(self, payout_id: str) -> str | None:
        """Return why a withdrawal will never be carried out, None if it was not refused."""
        with typed_redis_errors():
            return cast(str | None, await self._redis.get(_REFUSED + payout_id))

    async def status(
        self, address: str, nonce: int, result: Callable[[str], Awaitable[Result | None]]
    ) -> WithdrawalStatus:
        """Return how far an address's withdrawal with this nonce has come; raises NotFound.

        `result` returns what a transfer of the ledger did.
        """
        payout_id = withdrawal_id(address, nonce)
        # First: a withdrawal that no longer waits has left its mark in one of the other places before.
        waiting = await self._waiting_of(address)
        if await result(f"{payout_id}:paid"):
            return WithdrawalStatus(WithdrawalState.PAID)
        if await result(f"{payout_id}:refused"):
            return WithdrawalStatus(
                WithdrawalState.REFUSED, "the chain did not carry it out; the money is back"
            )
        if await result(f"{payout_id}:planned"):
            return WithdrawalStatus(WithdrawalState.SENDING)
        if reason := await self.refusal(payout_id):
            return WithdrawalStatus(WithdrawalState.REFUSED, reason)
        if waiting is not None and waiting.withdrawal.payout_id == payout_id:
            return WithdrawalStatus(WithdrawalState.WAITING)
        raise NotFound("there is no such withdrawal", param="nonce", code="withdrawal_not_found")

    async def _waiting_of(self, address: str) -> SignedWithdrawal | None:
        with typed_redis_errors():
            found = await cast(Awaitable[str | None], self._redis.hget(_WAITING, address))
        return None if found is None else _SIGNED.validate_json(found)


def _encoded(signed: SignedWithdrawal) -> str:
    return _SIGNED.dump_json(signed).decode()
