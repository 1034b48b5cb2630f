"""The books' process: the only one with rights on the ledger, which each caller reaches by its own calls."""

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from redis.asyncio import Redis

from azu.auth.enrolment import Enrolment
from azu.auth.key_records import ApiKey
from azu.auth.signatures import MAX_WITHDRAWAL_LIFE_MS, Withdrawal, is_signed
from azu.auth.tickets import EnrolmentCalls
from azu.errors import Conflict, Forbidden, InsufficientBalance, InvalidRequest
from azu.money.books import BooksCalls, Totals, UserBalance, WorkerEarnings
from azu.money.ledger.audit import Audit, audit
from azu.money.ledger.losses import Loss
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.transfers import (
    PLATFORM,
    Deposit,
    Expire,
    Reserve,
    WithdrawalPlanned,
    user_available,
    user_reserved,
    user_withdrawing,
    worker_earned,
    worker_paid,
    worker_paying,
)
from azu.money.spend_limits import RedisSpending, SpendLimits
from azu.money.treasury.deposits import deposit_id
from azu.money.treasury.receipts import job_end
from azu.money.treasury.redis import EarningsClaims, RedisUncredited, Uncredited
from azu.money.treasury.withdrawals import (
    LEAST_LAMPORTS,
    RedisWithdrawals,
    SignedWithdrawal,
    WithdrawalStatus,
)
from azu.money.wire import Access, WireServer
from azu.protocol.job import Receipt
from azu.redis_client import connect_redis
from azu.units import hype_from_lamports

# A caller is answered within a second while Redis is away.
_SILENCE_S = 0.5
# More reservations at once wait here: in the queue for a connection they would fail after its timeout.
_RESERVATIONS_AT_ONCE = 16
_READS = frozenset({"balance", "earnings", "withdrawal", "spent", "totals", "loss", "uncredited"})
# The calls that each caller may make.
ALLOWED: Mapping[str, frozenset[str]] = {
    "ingress": _READS | {"reserve", "give_back", "claim_earnings", "withdraw"},
    "scheduler": frozenset({"settle", "forget", "totals"}),
    "treasury": frozenset({"credit"}),
    "owner": _READS | {"audit", "accept_loss"},
}


# An ingress passes on what nodes ask; only the owner, on the head, makes tickets.
_ENROLMENT: Mapping[str, frozenset[str]] = {
    "ingress": frozenset({"enrol", "renew"}),
    "owner": frozenset({"new_ticket", "tickets", "revoke_ticket"}),
}


def allowed_to(enrolment: Enrolment | None) -> Mapping[str, frozenset[str]]:
    """Return the calls that each caller may make, with those of enrolment where there is one."""
    if enrolment is None:
        return ALLOWED
    return {caller: verbs | _ENROLMENT.get(caller, frozenset()) for caller, verbs in ALLOWED.items()}


@dataclass(frozen=True, slots=True)
class BooksConfig:
    """What the books run with: their Redis, the platform's address, and who may call them where.

    With `enrolment` they admit nodes.
    """

    redis_url: str = field(repr=False)
    platform_address: str
    access: Access
    enrolment: Enrolment | None = None


async def run(config: BooksConfig, *, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; call `ready` once, as soon as callers are served."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    bookkeeper = Bookkeeper.from_url(config.redis_url, config.platform_address)
    server = WireServer(BooksCalls, bookkeeper, config.access.secrets, allowed_to(config.enrolment))
    if config.enrolment is not None:
        server.serve(EnrolmentCalls, config.enrolment)
    await server.start(config.access.port)
    ready()
    try:
        await stop.wait()
    finally:
        await server.close()
        await bookkeeper.close()


class Bookkeeper(BooksCalls):
    """Carries out the calls of the books, which azu/money/books.py describes."""

    def __init__(self, redis: Redis, platform_address: str = "") -> None:
        self._redis = redis
        self._platform = platform_address
        self._reserving = asyncio.Semaphore(_RESERVATIONS_AT_ONCE)
        self._ledger = RedisLedger(redis)
        self._spend_limits = SpendLimits(RedisSpending(redis), self._ledger)
        self._claims = EarningsClaims(redis, platform_address)
        self._withdrawals = RedisWithdrawals(redis)
        self._uncredited = RedisUncredited(redis)

    @classmethod
    def from_url(cls, url: str, platform_address: str = "") -> "Bookkeeper":
        """Return the bookkeeper of the books in the Redis at `url`; it connects when it is first used.

        Only claims of earnings and withdrawals need the platform's address: their signatures name it.
        """
        return cls(connect_redis(url, silence_s=_SILENCE_S), platform_address)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def reserve(
        self, key: ApiKey, job_id: str, lamports: int, *, now_ms: int, expires_at_ms: int
    ) -> None:
        reserve = Reserve(
            id=f"reserve:{job_id}",
            address=key.address,
            job_id=job_id,
            lamports=lamports,
            expires_at_ms=expires_at_ms,
        )
        async with self._reserving:
            await self._spend_limits.take(key, job_id, lamports, now_ms)
            try:
                await self._ledger.apply(reserve)
            except InsufficientBalance:
                await self._spend_limits.give_back(key, job_id)
                raise

    async def give_back(self, job_id: str) -> None:
        if await self._ledger.reservation(job_id) is not None:
            await self._ledger.apply(Expire(id=f"expire:{job_id}", job_id=job_id))

    async def settle(self, receipt: Receipt) -> None:
        await self._ledger.apply(job_end(receipt))

    async def forget(self, job_ids: Sequence[str]) -> None:
        await self._ledger.forget(job_ids)

    async def spent(self, key: ApiKey, now_ms: int) -> int:
        return await self._spend_limits.spent(key, now_ms)

    async def credit(self, tx_hash: str, address: str, lamports: int) -> None:
        await self._ledger.apply(Deposit(id=deposit_id(tx_hash), address=address, lamports=lamports))

    async def balance(self, address: str) -> UserBalance:
        accounts = user_available(address), user_reserved(address), user_withdrawing(address)
        return UserBalance(*await self._ledger.balances_of(*accounts))

    async def earnings(self, address: str) -> WorkerEarnings:
        accounts = worker_earned(address), worker_paying(address), worker_paid(address)
        earned, paying, paid = await self._ledger.balances_of(*accounts)
        return WorkerEarnings(earned, paying, paid, await self._claims.has_claimed(address))

    async def claim_earnings(self, address: str, signature: str) -> None:
        if not await self._claims.claim(address, signature):
            raise Forbidden("this claim was not signed by the key's address", param="signature")

    async def withdraw(self, withdrawal: Withdrawal, signature: str, now_ms: int) -> WithdrawalStatus:
        if withdrawal.lamports < LEAST_LAMPORTS:
            least = hype_from_lamports(LEAST_LAMPORTS)
            raise InvalidRequest(f"a withdrawal is of at least {least} HYPE", param="lamports")
        if not is_signed(withdrawal, self._platform, signature):
            raise Forbidden("this withdrawal was not signed by the key's address", param="signature")
        if not 0 < withdrawal.expires_at_ms - now_ms <= MAX_WITHDRAWAL_LIFE_MS:
            raise InvalidRequest("a withdrawal is good for at most a day, from now on", param="expires_at_ms")
        planned = await self._ledger.result(f"{withdrawal.payout_id}:planned")
        if planned is None:
            available = await self._ledger.balance(user_available(withdrawal.address))
            if withdrawal.lamports > available:
                raise InsufficientBalance(
                    f"the account holds {available} lamports; this takes {withdrawal.lamports}"
                )
            await self._withdrawals.hand_in(SignedWithdrawal(withdrawal, signature))
        else:
            transfer = planned.entry.transfer
            if not isinstance(transfer, WithdrawalPlanned) or transfer.lamports != withdrawal.lamports:
                raise Conflict("this nonce was used before for another withdrawal", param="nonce")
        return await self.withdrawal(withdrawal.address, withdrawal.nonce)

    async def withdrawal(self, address: str, nonce: int) -> WithdrawalStatus:
        return await self._withdrawals.status(address, nonce, self._ledger)

    async def totals(self) -> Totals:
        totals, loss = totals_of(await self._ledger.balances()), await self.loss()
        return totals if loss is None else replace(totals, lost_writes=loss.size)

    async def loss(self) -> Loss | None:
        loss = await self._ledger.losses.look()
        return None if loss is None or loss.is_accepted else loss

    async def accept_loss(self, size: int) -> None:
        await self._ledger.losses.accept(size)

    async def uncredited(self) -> tuple[Uncredited, ...]:
        return await self._uncredited.all()

    async def audit(self, wallet_lamports: int | None = None) -> Audit:
        return await audit(await self._ledger.snapshot(), self._ledger.journal(), wallet_lamports)


def totals_of(balances: Mapping[str, int]) -> Totals:
    """Return the sums of all accounts' balances.

    Of each charge the platform's account gets one part and workers the rest, and neither gives any back: what
    workers earned stands in the three accounts through which it reaches their wallets.
    """
    held: Counter[str] = Counter()
    for account, lamports in balances.items():
        owner, _, rest = account.partition(":")
        if rest:
            held[f"{owner}_{rest.rpartition(':')[2]}"] += lamports
    paid = held.pop("worker_paid", 0)
    earned = held["worker_earned"] + held["worker_paying"] + paid
    return Totals(
        charged_lamports=earned + balances.get(PLATFORM, 0),
        earned_lamports=earned,
        paid_lamports=paid,
        held_lamports=held,
        sum_lamports=sum(balances.values()),
    )
