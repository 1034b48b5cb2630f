"""Withdrawals: how signed ones reach the treasury, and how they become payouts."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, cast

from pydantic import ConfigDict, TypeAdapter
from redis.asyncio import Redis

from azu.auth.withdrawals import Withdrawal, is_signed
from azu.connection import connect_redis
from azu.errors import Conflict, NotFound, Unavailable
from azu.ledger.rules import Result
from azu.treasury.clock import wall_clock_ms
from azu.treasury.dues import Due, Dues
from azu.treasury.errors import typed_redis_errors
from azu.treasury.outbox import Outbox, Payout

_LOG = logging.getLogger(__name__)
_WAITING = "azu:treasury:withdrawals:waiting"
_REFUSED = "azu:treasury:withdrawals:refused:"
_REFUSAL_KEPT_S = 30 * 86_400
# Signed, but not looked at by the treasury yet.
_MOST_WAITING = 10_000
# The chain sweeps balances under 0.01 HYPE.
LEAST_LAMPORTS = 1_000_000


class WithdrawalState(StrEnum):
    """WAITING for the treasury; SENDING: set aside and on its way; PAID and REFUSED are final."""

    WAITING = "waiting"
    SENDING = "sending"
    PAID = "paid"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Signed:
    """A withdrawal and its address's signature."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    withdrawal: Withdrawal
    signature: str


_SIGNED = TypeAdapter(Signed)


class Ledger(Protocol):
    """azu's books."""

    async def result(self, transfer_id: str) -> Result | None:
        """Return what a transfer did, None if it never was applied."""


class RedisWithdrawals:
    """Both ends: the ingress hands signed withdrawals in, the treasury takes them out.

    Every method raises Unavailable when Redis does not answer, and may be called again.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    @classmethod
    def from_url(cls, url: str) -> "RedisWithdrawals":
        """Return the withdrawals kept in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def hand_in(self, signed: Signed) -> None:
        """Write a withdrawal down for the treasury.

        Raises Conflict if its nonce was used for another one that waits, Unavailable if too many wait.
        """
        content, payout_id = _SIGNED.dump_json(signed).decode(), signed.withdrawal.payout_id
        with typed_redis_errors():
            if await self._redis.hlen(_WAITING) >= _MOST_WAITING:
                raise Unavailable("too many withdrawals are waiting for the treasury")
            if await self._redis.hsetnx(_WAITING, payout_id, content):
                return
            found = await cast(Awaitable[str | None], self._redis.hget(_WAITING, payout_id))
        if found is not None and _SIGNED.validate_json(found).withdrawal != signed.withdrawal:
            raise Conflict("this nonce was used before for another withdrawal", param="nonce")

    async def waiting(self) -> list[Signed]:
        """Return what was handed in and not taken out yet."""
        with typed_redis_errors():
            contents = await cast(Awaitable[list[str]], self._redis.hvals(_WAITING))
        return [_SIGNED.validate_json(content) for content in contents]

    async def take_out(self, payout_id: str) -> None:
        """Have a withdrawal wait no more."""
        with typed_redis_errors():
            await self._redis.hdel(_WAITING, payout_id)

    async def refuse(self, payout_id: str, reason: str) -> None:
        """Say why nothing will come of a withdrawal."""
        with typed_redis_errors():
            await self._redis.set(_REFUSED + payout_id, reason, ex=_REFUSAL_KEPT_S)

    async def refusal(self, payout_id: str) -> str | None:
        """Return why nothing will come of a withdrawal, None if it was not refused."""
        with typed_redis_errors():
            return cast(str | None, await self._redis.get(_REFUSED + payout_id))

    async def state(self, payout_id: str, ledger: Ledger) -> tuple[WithdrawalState, str | None]:
        """Return how far a withdrawal is and why it was refused; raises NotFound."""
        if await ledger.result(f"{payout_id}:paid"):
            return WithdrawalState.PAID, None
        if await ledger.result(f"{payout_id}:refused"):
            return WithdrawalState.REFUSED, "the chain did not carry it out; the money is back"
        if await ledger.result(f"{payout_id}:planned"):
            return WithdrawalState.SENDING, None
        if reason := await self.refusal(payout_id):
            return WithdrawalState.REFUSED, reason
        with typed_redis_errors():
            if await self._redis.hexists(_WAITING, payout_id):
                return WithdrawalState.WAITING, None
        raise NotFound("there is no such withdrawal", param="nonce", code="withdrawal_not_found")


class Withdrawals:
    """Turns signed withdrawals into payouts, each once; safe to kill anywhere and to run twice."""

    def __init__(
        self,
        withdrawals: RedisWithdrawals,
        ledger: Ledger,
        outbox: Outbox,
        dues: Dues,
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
        for signed in await self._withdrawals.waiting():
            payout_id = signed.withdrawal.payout_id
            if await self._is_decided(payout_id):
                await self._withdrawals.take_out(payout_id)
                continue
            open_lamports = {payout.address: payout.lamports for payout in await self._outbox.open()}
            if signed.withdrawal.address in open_lamports:
                continue  # this one, or another payout to the same address
            if reason := self._fault(signed):
                await self._withdrawals.refuse(payout_id, reason)
            else:
                await self._plan(signed.withdrawal, open_lamports, max_open, since_ms)

    async def _is_decided(self, payout_id: str) -> bool:
        if await self._ledger.result(f"{payout_id}:planned") is not None:
            return True
        return await self._withdrawals.refusal(payout_id) is not None

    def _fault(self, signed: Signed) -> str | None:
        """Say what is wrong with a withdrawal; the ingress has looked too, but nobody has to trust it."""
        if not is_signed(signed.withdrawal, self._platform, signed.signature):
            return "it was not signed by its address"
        if signed.withdrawal.expires_at_ms <= self._now_ms():
            return "it expired before it was carried out"
        if signed.withdrawal.lamports < LEAST_LAMPORTS:
            return f"it is less than {LEAST_LAMPORTS} lamports, which the chain would sweep away"
        return None

    async def _plan(
        self, withdrawal: Withdrawal, open_lamports: Mapping[str, int], max_open: int, since_ms: int
    ) -> None:
        room, funds = await self._dues.spare(open_lamports, max_open)
        if room <= 0 or withdrawal.lamports > funds:
            _LOG.error("the platform cannot send a withdrawal now: %s", withdrawal)
            return
        if not await self._dues.payable(Due(withdrawal.address, withdrawal.lamports)):
            reason = "the address is new to the chain, or barred there, and it is too little for that"
            await self._withdrawals.refuse(withdrawal.payout_id, reason)
            return
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

    async def dropped(self, payout: Payout) -> None:
        """Hear of a payout for which the ledger set nothing aside."""
        if payout.payee == "user":
            await self._withdrawals.refuse(payout.payout_id, "the account does not hold so much any more")
