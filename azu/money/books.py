"""The one door to money: the calls of the books' process in plain values, and `Books`, its client.

Nothing outside azu.money imports its store adapters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from azu.auth.key_records import ApiKey
from azu.auth.signatures import Withdrawal
from azu.auth.tickets import EnrolmentCalls
from azu.contact import Contact
from azu.metrics import MetricsSnapshot
from azu.money.ledger.audit import Audit
from azu.money.ledger.losses import Loss
from azu.money.treasury.deposits import DepositStatus
from azu.money.treasury.redis import RedisMetrics
from azu.money.treasury.redis import Uncredited as Uncredited  # noqa: PLC0414 - callers name the type
from azu.money.treasury.request_reply import DepositRequests, ReceiptRequests
from azu.money.treasury.withdrawals import WithdrawalStatus
from azu.money.wire import Remote
from azu.protocol.job import Receipt

# Longer than the books wait for their Redis, so that they can say what is away.
_SILENCE_S = 5.0


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


class BooksCalls:
    """The calls of the books. Each raises Unavailable when the books, or their Redis, do not answer.

    A write may then have been made; it is safe to make the call again with the same values.
    """

    async def reserve(
        self, key: ApiKey, job_id: str, lamports: int, *, now_ms: int, expires_at_ms: int
    ) -> None:
        """Set aside the most that a job can cost, from the account of the key's address.

        Raises Unauthenticated for a key that has expired, InsufficientBalance if the account does not cover
        the amount, or the key's limit (code `spend_limit_reached`). Then nothing is set aside.
        """

    async def give_back(self, job_id: str) -> None:
        """Return what is reserved for a job that was marked as lost, and so never runs."""

    async def settle(self, receipt: Receipt) -> None:
        """End a job's reservation as its receipt says: charge and share out, or release all of it.

        The receipt's `transfer_id` makes it safe to repeat. Raises LedgerError for a receipt that does not
        fit the reservation, TransferConflict if the id was used for another transfer.
        """

    async def forget(self, job_ids: Sequence[str]) -> None:
        """Keep nothing of jobs that have ended but what the journal has of them."""

    async def spent(self, key: ApiKey, now_ms: int) -> int:
        """Return the lamports that count against a key's spend limit; open jobs count in full."""

    async def credit(self, tx_hash: str, address: str, lamports: int) -> None:
        """Credit a deposit that the chain's ledger shows, once for each hash.

        In a network only the treasury may do this, after it has read the chain itself.
        """

    async def balance(self, address: str) -> UserBalance:
        """Return a user's balance at one moment."""

    async def earnings(self, address: str) -> WorkerEarnings:
        """Return what a worker's address earned by lending."""

    async def claim_earnings(self, address: str, signature: str) -> None:
        """Note that an address claims its earnings, which are paid out from then on.

        Raises Forbidden if the address did not sign the claim.
        """

    async def withdraw(self, withdrawal: Withdrawal, signature: str, now_ms: int) -> WithdrawalStatus:
        """Hand a signed withdrawal to the treasury; the same one sent again changes nothing.

        Raises InvalidRequest for an amount that is too small or a time out of range, Forbidden if the address
        did not sign it, InsufficientBalance, and Conflict if the nonce was used for another amount or another
        withdrawal of the address waits.
        """

    async def withdrawal(self, address: str, nonce: int) -> WithdrawalStatus:
        """Return how far an address's withdrawal has come; raises NotFound for an unknown one."""

    async def totals(self) -> Totals:
        """Return the sums over all accounts."""

    async def loss(self) -> Loss | None:
        """Return how far Redis went back, None if it has all that it answered or the admin accepted that.

        Until the admin accepts, the treasury signs nothing.
        """

    async def accept_loss(self, size: int) -> None:
        """Have the treasury sign again after a loss of this size; raises Conflict for another size."""

    async def uncredited(self) -> tuple[Uncredited, ...]:
        """Return the transfers to the platform that were credited to no account, the newest first."""

    async def audit(self, wallet_lamports: int | None = None) -> Audit:
        """Rebuild the books from their journal and compare them with what is stored.

        `wallet_lamports` is what the platform's wallet holds on the chain, None if that is not compared.
        """


class Members(Remote, EnrolmentCalls, calls=EnrolmentCalls):
    """The calls by which nodes are admitted: the books' process has the key of the nodes' authority."""

    def __init__(self, url: str) -> None:
        super().__init__(url, Contact("the books", "are"), silence_s=_SILENCE_S)


class Books(Remote, BooksCalls, calls=BooksCalls):
    """The books of one network, as one caller may use them.

    `url` has the caller's name and secret; `treasury_redis` is where it asks the treasury, if it does.
    """

    def __init__(
        self, url: str, treasury_redis: Redis | None = None, *, silence_s: float = _SILENCE_S
    ) -> None:
        super().__init__(url, Contact("the books", "are"), silence_s=silence_s)
        self._treasury_redis = treasury_redis

    async def deposit(self, tx_hash: str, address: str, timeout_s: float) -> DepositStatus:
        """Have the treasury look for a transfer on the chain and credit it; return CREDITED or PENDING.

        A pending deposit has 0 lamports and is credited later without another call. Raises InvalidRequest for
        a malformed hash or address, NotFound for a hash that the chain does not know, Forbidden if another
        address sent the transfer, DepositRejected if it is no deposit of HYPE to the platform,
        DeadlineExceeded if the treasury does not answer in `timeout_s`, Unavailable if too many wait.
        """
        return await DepositRequests(self._redis).ask(tx_hash, address, timeout_s)

    async def receipt_signature(self, job_id: str, timeout_s: float) -> str | None:
        """Return the platform's signature of an ended job's receipt, in hex.

        None if the treasury does not answer in `timeout_s`, or if the ledger contradicts the receipt.
        """
        return await ReceiptRequests(self._redis).ask(job_id, timeout_s)

    async def treasury_metrics(self) -> tuple[str, MetricsSnapshot] | None:
        """Return the name of the treasury's process and its metrics; None while it is away."""
        return await RedisMetrics(self._redis).read()

    @property
    def _redis(self) -> Redis:
        assert self._treasury_redis is not None, "this caller asks the treasury nothing"
        return self._treasury_redis
