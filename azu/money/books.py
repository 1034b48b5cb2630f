"""The one door to money: everything that other rooms do with balances, in plain values.

Nothing outside azu.money imports its store adapters. The methods are asynchronous and take and return plain
values, so that the books can become a process of their own with `Books` as its client.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from redis.asyncio import Redis

from azu.auth.key_records import ApiKey
from azu.auth.signatures import MAX_WITHDRAWAL_LIFE_MS, Withdrawal, is_signed
from azu.errors import Conflict, Forbidden, InsufficientBalance, InvalidRequest
from azu.metrics import MetricsSnapshot
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
from azu.money.treasury.deposits import DepositStatus, deposit_id
from azu.money.treasury.receipts import job_end
from azu.money.treasury.redis import EarningsClaims, RedisMetrics, RedisUncredited
from azu.money.treasury.redis import Uncredited as Uncredited  # noqa: PLC0414 - callers name the type
from azu.money.treasury.request_reply import DepositRequests, ReceiptRequests
from azu.money.treasury.withdrawals import (
    LEAST_LAMPORTS,
    RedisWithdrawals,
    SignedWithdrawal,
    WithdrawalStatus,
)
from azu.protocol.job import Receipt
from azu.redis_client import connect_redis
from azu.units import hype_from_lamports

# More reservations at once wait here: in the queue for a connection they would fail after its timeout.
_RESERVATIONS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class UserBalance:
    """What a user may spend, what the user's open jobs hold, and what is on its way to the user's wallet."""

    available_lamports: int
    reserved_lamports: int
    withdrawing_lamports: int


@dataclass(frozen=True, slots=True)
class WorkerEarnings:
    """What a worker earned, what is on its way to the worker's wallet, and what arrived there.

    `claimed` says whether the worker's address has claimed its earnings: without that nothing is paid out.
    """

    earned_lamports: int
    paying_lamports: int
    paid_lamports: int
    claimed: bool


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all accounts since the books were opened, in lamports.

    `held_lamports` maps a kind of account, such as "user_available", to what azu holds there.
    `sum_lamports` is the sum of all accounts, always zero. `lost_writes` is the size of an open loss.
    """

    charged_lamports: int
    earned_lamports: int
    paid_lamports: int
    held_lamports: Mapping[str, int]
    sum_lamports: int
    lost_writes: int = 0


class Books:
    """The books of one network; any number of processes may share them.

    Every method raises Unavailable when Redis does not answer. A write may then have been made; it is safe to
    call the method again with the same values.
    """

    def __init__(self, redis: Redis, requests_redis: Redis, platform_address: str = "") -> None:
        self._connections = (redis, requests_redis)
        self._platform = platform_address
        self._reserving = asyncio.Semaphore(_RESERVATIONS_AT_ONCE)
        self._ledger = RedisLedger(redis)
        self._spend_limits = SpendLimits(RedisSpending(redis), self._ledger)
        # With connections of their own: callers that wait for the treasury must not delay the ledger's.
        self._deposits = DepositRequests(requests_redis)
        self._receipts = ReceiptRequests(requests_redis)
        self._claims = EarningsClaims(requests_redis, platform_address)
        self._withdrawals = RedisWithdrawals(requests_redis)
        self._treasury = RedisMetrics(requests_redis)
        self._uncredited = RedisUncredited(requests_redis)

    @classmethod
    def from_url(cls, url: str, platform_address: str = "") -> "Books":
        """Return the books in the Redis at `url`; they connect when they are first used.

        Only claims of earnings and withdrawals need the platform's address: their signatures name it.
        """
        return cls(connect_redis(url), connect_redis(url), platform_address)

    async def close(self) -> None:
        """Close the connections."""
        for redis in self._connections:
            await redis.aclose()

    async def reserve(
        self, key: ApiKey, job_id: str, lamports: int, *, now_ms: int, expires_at_ms: int
    ) -> None:
        """Set aside the most that a job can cost, from the account of the key's address.

        Raises Unauthenticated for a key that has expired, InsufficientBalance if the account does not cover
        the amount, or the key's limit (code `spend_limit_reached`). Then nothing is set aside.
        """
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
        """Return what is reserved for a job that was marked as lost, and so never runs."""
        if await self._ledger.reservation(job_id) is not None:
            await self._ledger.apply(Expire(id=f"expire:{job_id}", job_id=job_id))

    async def settle(self, receipt: Receipt) -> None:
        """End a job's reservation as its receipt says: charge and share out, or release all of it.

        The receipt's `transfer_id` makes it safe to repeat. Raises LedgerError for a receipt that does not
        fit the reservation, TransferConflict if the id was used for another transfer.
        """
        await self._ledger.apply(job_end(receipt))

    async def forget(self, job_ids: Sequence[str]) -> None:
        """Keep nothing of jobs that have ended but what the journal has of them."""
        await self._ledger.forget(job_ids)

    async def receipt_signature(self, job_id: str, timeout_s: float) -> str | None:
        """Return the platform's signature of an ended job's receipt, in hex.

        None if the treasury does not answer in `timeout_s`, or if the ledger contradicts the receipt.
        """
        return await self._receipts.ask(job_id, timeout_s)

    async def spent(self, key: ApiKey, now_ms: int) -> int:
        """Return the lamports that count against a key's spend limit; open jobs count in full."""
        return await self._spend_limits.spent(key, now_ms)

    async def deposit(self, tx_hash: str, address: str, timeout_s: float) -> DepositStatus:
        """Have the treasury look for a transfer on the chain and credit it; return CREDITED or PENDING.

        A pending deposit has 0 lamports and is credited later without another call. Raises InvalidRequest for
        a malformed hash or address, NotFound for a hash that the chain does not know, Forbidden if another
        address sent the transfer, DepositRejected if it is no deposit of HYPE to the platform,
        DeadlineExceeded if the treasury does not answer in `timeout_s`, Unavailable if too many wait.
        """
        return await self._deposits.ask(tx_hash, address, timeout_s)

    async def credit(self, tx_hash: str, address: str, lamports: int) -> None:
        """Credit a deposit that the chain's ledger shows, once for each hash.

        In a network only the treasury may do this, after it has read the chain itself.
        """
        await self._ledger.apply(Deposit(id=deposit_id(tx_hash), address=address, lamports=lamports))

    async def balance(self, address: str) -> UserBalance:
        """Return a user's balance at one moment."""
        accounts = user_available(address), user_reserved(address), user_withdrawing(address)
        return UserBalance(*await self._ledger.balances_of(*accounts))

    async def earnings(self, address: str) -> WorkerEarnings:
        """Return what a worker's address earned by lending."""
        accounts = worker_earned(address), worker_paying(address), worker_paid(address)
        earned, paying, paid = await self._ledger.balances_of(*accounts)
        return WorkerEarnings(earned, paying, paid, await self._claims.has_claimed(address))

    async def claim_earnings(self, address: str, signature: str) -> None:
        """Note that an address claims its earnings, which are paid out from then on.

        Raises Forbidden if the address did not sign the claim.
        """
        if not await self._claims.claim(address, signature):
            raise Forbidden("this claim was not signed by the key's address", param="signature")

    async def withdraw(self, withdrawal: Withdrawal, signature: str, now_ms: int) -> WithdrawalStatus:
        """Hand a signed withdrawal to the treasury; the same one sent again changes nothing.

        Raises InvalidRequest for an amount that is too small or a time out of range, Forbidden if the address
        did not sign it, InsufficientBalance, and Conflict if the nonce was used for another amount or another
        withdrawal of the address waits.
        """
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
        """Return how far an address's withdrawal has come; raises NotFound for an unknown one."""
        return await self._withdrawals.status(address, nonce, self._ledger)

    async def treasury_metrics(self) -> tuple[str, MetricsSnapshot] | None:
        """Return the name of the treasury's process and its metrics; None while it is away."""
        return await self._treasury.read()

    async def totals(self) -> Totals:
        """Return the sums over all accounts."""
        totals, loss = totals_of(await self._ledger.balances()), await self.loss()
        return totals if loss is None else replace(totals, lost_writes=loss.size)

    async def loss(self) -> Loss | None:
        """Return how far Redis went back, None if it has all that it answered or the admin accepted that.

        Until the admin accepts, the treasury signs nothing.
        """
        loss = await self._ledger.losses.look()
        return None if loss is None or loss.is_accepted else loss

    async def accept_loss(self, size: int) -> None:
        """Have the treasury sign again after a loss of this size; raises Conflict for another size."""
        await self._ledger.losses.accept(size)

    async def uncredited(self) -> tuple[Uncredited, ...]:
        """Return the transfers to the platform that were credited to no account, the newest first."""
        return await self._uncredited.all()

    async def audit(self, wallet_lamports: int | None = None) -> Audit:
        """Rebuild the books from their journal and compare them with what is stored.

        `wallet_lamports` is what the platform's wallet holds on the chain, None if that is not compared.
        """
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
