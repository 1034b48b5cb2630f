"""Withdrawals: how signed ones reach the treasury, and how they become payouts."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from pydantic import ConfigDict, TypeAdapter
from redis.asyncio import Redis

from azu.auth.signatures import Withdrawal, is_signed, withdrawal_id
from azu.clock import wall_clock_ms
from azu.errors import Conflict, NotFound, Unavailable
from azu.money.ledger.redis import RedisLedger
from azu.money.treasury.outbox import Outbox, Payout
from azu.money.treasury.payouts import AmountOwed, PayoutSelector
from azu.redis_client import connect_redis, typed_redis_errors

_LOG = logging.getLogger(__name__)
_WAITING = "azu:treasury:withdrawals:waiting"
_REFUSED = "azu:treasury:withdrawals:refused:"
_REFUSAL_KEPT_S = 30 * 86_400
# Signed, but not looked at by the treasury yet.
_MOST_WAITING = 10_000
# The chain sweeps balances under 0.01 HYPE.
LEAST_LAMPORTS = 1_000_000

# Only what is still there: another one of the same address may wait by now.
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
    """A withdrawal and its address's signature."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    withdrawal: Withdrawal
    signature: str


_SIGNED = TypeAdapter(SignedWithdrawal)


class RedisWithdrawals:
    """Both ends: the ingress hands signed withdrawals in, the treasury takes them out.

    Of an address at most one waits, so that nobody keeps the others waiting. Every method raises Unavailable
    when Redis does not answer, and may be called again.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._take_out = redis.register_script(_TAKE_OUT)

    @classmethod
    def from_url(cls, url: str) -> "RedisWithdrawals":
        """Return the withdrawals kept in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def hand_in(self, signed: SignedWithdrawal) -> None:
        """Write a withdrawal down for the treasury.

        Raises Conflict while another one of its address waits, Unavailable if too many wait.
        """
        content, address = _encoded(signed), signed.withdrawal.address
        with typed_redis_errors():
            if await self._redis.hlen(_WAITING) >= _MOST_WAITING:
                raise Unavailable("too many withdrawals are waiting for the treasury")
            if await self._redis.hsetnx(_WAITING, address, content):
                return
        found = await self._waiting_of(address)
        if found is not None and found.withdrawal != signed.withdrawal:
            raise Conflict("another withdrawal of this address waits for the treasury", param="nonce")

    async def waiting(self) -> list[SignedWithdrawal]:
        """Return what was handed in and not taken out yet."""
        with typed_redis_errors():
            contents = await cast(Awaitable[list[str]], self._redis.hvals(_WAITING))
        return [_SIGNED.validate_json(content) for content in contents]

    async def take_out(self, signed: SignedWithdrawal) -> None:
        """Have a withdrawal wait no more."""
        with typed_redis_errors():
            await self._take_out([_WAITING], [signed.withdrawal.address, _encoded(signed)])

    async def refuse(self, payout_id: str, reason: str) -> None:
        """Say why nothing will come of a withdrawal."""
        with typed_redis_errors():
            await self._redis.set(_REFUSED + payout_id, reason, ex=_REFUSAL_KEPT_S)

    async def refusal(self, payout_id: str) -> str | None:
        """Return why nothing will come of a withdrawal, None if it was not refused."""
        with typed_redis_errors():
            return cast(str | None, await self._redis.get(_REFUSED + payout_id))

    async def status(self, address: str, nonce: int, ledger: RedisLedger) -> WithdrawalStatus:
        """Return how far an address's withdrawal with this nonce has come; raises NotFound."""
        payout_id = withdrawal_id(address, nonce)
        # First: a withdrawal that no longer waits has left its mark in one of the other places before.
        waiting = await self._waiting_of(address)
        if await ledger.result(f"{payout_id}:paid"):
            return WithdrawalStatus(WithdrawalState.PAID)
        if await ledger.result(f"{payout_id}:refused"):
            return WithdrawalStatus(
                WithdrawalState.REFUSED, "the chain did not carry it out; the money is back"
            )
        if await ledger.result(f"{payout_id}:planned"):
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


class WithdrawalPlanner:
    """Turns signed withdrawals into payouts, each once; safe to kill anywhere and to run twice."""

    def __init__(
        self,
        withdrawals: RedisWithdrawals,
        ledger: RedisLedger,
        outbox: Outbox,
        dues: PayoutSelector,
        *,
        platform: str,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._withdrawals = withdrawals
        self._ledger = ledger
        self._outbox = outbox
        self._dues = dues
        self._platform = platform
        self._now_ms = now_ms

    async def plan(self, max_open: int, since_ms: int) -> None:
        """Write payouts down for what waits and can be paid now. Raises ChainError.

        A withdrawal waits until the ledger has set its money aside or it was refused: at no moment is it
        nowhere. `since_ms` is a time of the chain that is not in its future.
        """
        undecided = [
            signed for signed in await self._withdrawals.waiting() if not await self._settled(signed)
        ]
        if not undecided:
            return
        open_lamports = {payout.address: payout.lamports for payout in await self._outbox.open()}
        room, funds = await self._dues.spare(open_lamports, max_open)
        for signed in undecided:
            withdrawal = signed.withdrawal
            if withdrawal.address in open_lamports:
                continue  # this one, or another payout to the same address
            if fault := self._fault(signed):
                await self._refuse(signed, fault)
            elif room <= 0 or withdrawal.lamports > funds:
                _LOG.error("the platform cannot send a withdrawal now: %s", withdrawal)
            elif obstacle := await self._obstacle(withdrawal):
                await self._refuse(signed, obstacle)
            else:
                await self._plan(withdrawal, since_ms)
                room, funds = room - 1, funds - withdrawal.lamports

    async def _refuse(self, signed: SignedWithdrawal, reason: str) -> None:
        await self._withdrawals.refuse(signed.withdrawal.payout_id, reason)
        await self._withdrawals.take_out(signed)

    async def was_refused(self, payout: Payout) -> bool:
        """Say whether a payout's user was told that nothing will come of it."""
        return payout.payee == "user" and await self._withdrawals.refusal(payout.payout_id) is not None

    async def dropped(self, payout: Payout) -> None:
        """Hear of a payout for which the ledger set nothing aside."""
        if payout.payee == "user":
            await self._withdrawals.refuse(payout.payout_id, "the account does not hold so much any more")

    async def _settled(self, signed: SignedWithdrawal) -> bool:
        """Take a withdrawal out if the ledger has set its money aside or it was refused; say if so."""
        if not await self._is_decided(signed.withdrawal.payout_id):
            return False
        await self._withdrawals.take_out(signed)
        return True

    async def _is_decided(self, payout_id: str) -> bool:
        if await self._ledger.result(f"{payout_id}:planned") is not None:
            return True
        return await self._withdrawals.refusal(payout_id) is not None

    def _fault(self, signed: SignedWithdrawal) -> str | None:
        """Say what is wrong with a withdrawal; the ingress has looked too, but nobody has to trust it."""
        if not is_signed(signed.withdrawal, self._platform, signed.signature):
            return "it was not signed by its address"
        if signed.withdrawal.expires_at_ms <= self._now_ms():
            return "it expired before it was carried out"
        if signed.withdrawal.lamports < LEAST_LAMPORTS:
            return f"it is less than {LEAST_LAMPORTS} lamports, which the chain would sweep away"
        return None

    async def _obstacle(self, withdrawal: Withdrawal) -> str | None:
        """Say why the chain would not carry a withdrawal out, or not for what it costs."""
        if await self._dues.payable(AmountOwed(withdrawal.address, withdrawal.lamports)):
            return None
        return "the address is new to the chain, or barred there, and it is too little for that"

    async def _plan(self, withdrawal: Withdrawal, since_ms: int) -> None:
        payout = Payout(
            payout_id=withdrawal.payout_id,
            address=withdrawal.address,
            lamports=withdrawal.lamports,
            planned_at_ms=self._now_ms(),
            since_ms=since_ms,
            payee="user",
        )
        if await self._outbox.add(payout):
            _LOG.info("planned %s of %d lamports", payout.payout_id, payout.lamports)
