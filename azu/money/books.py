"""The one door to money: the calls of the books' process in plain values, and `Books`, its client.

Nothing outside azu.money imports its store adapters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict
from redis.asyncio import Redis

from azu.auth.key_records import ApiKey
from azu.auth.signatures import ReceiptSignature, Withdrawal
from azu.auth.tickets import EnrolmentCalls
from azu.contact import Contact
from azu.metrics import MetricsSnapshot
from azu.money.ledger.audit import Audit
from azu.money.ledger.entry import Result
from azu.money.ledger.transfers import (
    Deposit,
    PayoutPaid,
    PayoutPlanned,
    PayoutRefused,
    RevenueTaken,
    Suspended,
    UnknownOut,
    WithdrawalPlanned,
)
from azu.money.signer.views import BooksHead, BooksView, OpenPayout
from azu.money.treasury.redis import RedisMetrics
from azu.money.treasury.redis import Uncredited as Uncredited  # noqa: PLC0414 - callers name the type
from azu.money.treasury.request_reply import DepositRequests, DepositStatus
from azu.money.treasury.withdrawals import WithdrawalStatus
from azu.money.wire import Remote
from azu.protocol.job import JobEnding, JobOutcome

# Longer than the books wait for their Redis, so that they can say what is away.
_SILENCE_S = 5.0
# The codes of errors after which a model's fee goes back: this network has no place for it.
NOT_PROVIDED = frozenset({"registry_full", "disk_failed"})

# What the treasury books; it is checked against the chain before it comes here.
TreasuryTransfer = (
    Deposit
    | Suspended
    | UnknownOut
    | PayoutPlanned
    | WithdrawalPlanned
    | RevenueTaken
    | PayoutPaid
    | PayoutRefused
)


@dataclass(frozen=True, slots=True)
class BooksTerms:
    """By what a network's books reckon: the price of new jobs, and for how long things stay open.

    An address has at most `max_keys` keys and `max_reservations` open at once, a machine `max_nodes` nodes;
    all addresses that never had money have `max_unfunded_keys` together, each for `unfunded_key_ms`, and as
    many claims. What a job pays out may be reversed for `maturity_ms`. Work of nodes that are not enrolled is
    paid to `others_payout`; without one it is held. The wallets of `admins` (lower-case addresses) sign
    commands.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    lamports_per_token_layer: int
    platform_percent: int
    reservation_ttl_ms: int
    max_keys: int
    max_nodes: int
    max_unfunded_keys: int
    unfunded_key_ms: int
    max_reservations: int = 4096
    key_day_lamports: int | None = None
    fetch_lamports_per_gib: int = 0
    fetch_unused_ms: int = 86_400_000
    maturity_ms: int = 0
    others_payout: str | None = None
    admins: tuple[str, ...] = ()


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
class KeySpending:
    """A key, and what counts against its limit, in all and today (UTC); open jobs count in full."""

    key: ApiKey
    spent_lamports: int
    today_lamports: int


@dataclass(frozen=True, slots=True)
class JobDispute:
    """A disputed job: what all got for it is held until an admin gives it to them, or back to `payer`."""

    job_id: str
    payer: str
    lamports: int


@dataclass(frozen=True, slots=True)
class JobDecision:
    """What became of what a job paid out, beside its receipt.

    `state` is "none", "held" while its dispute waits for an admin, "dismissed" or "reversed"; `lamports` are
    held, or went back to the payer.
    """

    state: Literal["none", "held", "dismissed", "reversed"] = "none"
    lamports: int = 0


@dataclass(frozen=True, slots=True)
class ReversibleJob:
    """What a job of `payer` paid out, account -> lamports; until `matures_at_ms` an admin can reverse it."""

    job_id: str
    payer: str
    matures_at_ms: int
    accounts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ReversibleJobs:
    """The largest jobs that can be reversed, and how many smaller ones are left out."""

    jobs: tuple[ReversibleJob, ...]
    num_left_out: int


@dataclass(frozen=True, slots=True)
class NodesHeldMoney:
    """What is held of a node's work, and how much of that has matured; `payout` is what the node enrolled."""

    node_id: str
    payout: str | None
    lamports: int
    matured_lamports: int


@dataclass(frozen=True, slots=True)
class HeldMoney:
    """The money that waits for an admin: of nodes, of disputed jobs, and rows of the chain in suspense."""

    nodes: tuple[NodesHeldMoney, ...]
    disputes: tuple[JobDispute, ...]
    suspense: tuple[Suspended, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all accounts since the books were opened, in lamports.

    `held_lamports` maps a kind of account, such as "user_available", to what azu holds there.
    `sum_lamports` is the sum of all accounts, always zero. `lost_writes` is the size of an open loss,
    `unsigned` why the signer signs nothing, empty while it does.
    """

    charged_lamports: int
    earned_lamports: int
    paid_lamports: int
    held_lamports: Mapping[str, int]
    sum_lamports: int
    lost_writes: int = 0
    unsigned: tuple[str, ...] = ()


class BooksCalls:
    """The calls of the books. Each raises Unavailable when the books, or their Redis, do not answer.

    A write may then have been made; it is safe to make the call again with the same values.
    """

    # Keys

    async def key(self, bearer: str) -> ApiKey:
        """Return the key of a bearer secret; raises Unauthenticated unless it is valid now."""

    async def open_key(self, key: ApiKey) -> None:
        """Open a key that its address's wallet signed.

        Raises Unauthenticated for a record that was not signed just now, Conflict for a key that was opened
        before, Forbidden when the address has too many (code `too_many_keys`), or addresses that never had
        money have (`too_many_unfunded_keys`).
        """

    async def revoke_key(self, bearer: str, key_id: str) -> None:
        """Make a key of the bearer's address invalid at once.

        Raises NotFound when the address has no such key, Forbidden when a key that expires or has a limit
        would revoke another one.
        """

    async def keys(self, address: str) -> tuple[KeySpending, ...]:
        """Return an address's keys, expired ones too, in the order in which they were opened."""

    async def paid(self, address: str) -> int:
        """Return what an address paid for jobs today (UTC) and in the 29 days before, in lamports."""

    # Jobs

    async def price(self) -> int:
        """Return what new jobs cost, in lamports per token and layer."""

    async def reserve(
        self,
        bearer: str,
        job_id: str,
        *,
        model_id: str,
        revision: str,
        num_layers: int,
        prompt_tokens: int,
        max_tokens: int,
    ) -> int:
        """Set aside the most that a job can cost, from the account of the key's address; return it.

        The price of now is the job's price until its end; `max_tokens` counts all its choices. Raises
        Unauthenticated for a key that is not valid now, InsufficientBalance if the account does not cover
        the amount, or the key's limit (code `spend_limit_reached`), or that of a day for a key that has none
        (`day_limit_reached`), InvalidRequest for a job without layers or tokens, or with an id that is no
        job's, RateLimited for an account with too many open reservations. Then nothing is set aside.
        """

    async def reserve_fetch(self, bearer: str, fetch_id: str, *, model_id: str, num_bytes: int) -> int:
        """Set aside the fee for a model that is new here, from the account of the key's address; return it.

        `fetch_id` begins with "fetch-". Where a fee for the model is set aside already it is 0. The fee goes
        back once a job of the model is charged, and to the platform where none is in time. Raises what
        `reserve` does.
        """

    async def give_back(self, job_id: str) -> None:
        """Return what is reserved for a job that was marked as lost, or a model that cannot be had."""

    async def give_fees_back(self, model_id: str) -> None:
        """Return the fees that are set aside for a model which the network could not provide."""

    async def settle(
        self,
        job_id: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        work: Mapping[int, Mapping[str, int]],
        ending: JobEnding,
    ) -> JobOutcome:
        """End a job: charge these tokens, share the charge out by the work, and release the rest.

        `work` maps layer -> node id -> parameter bytes that the node activated there. Returns how the job
        has ended: for a job that ended before, as it ended then. Raises LedgerError (`unknown_hold`) where
        nothing was ever reserved for the job.
        """

    async def ended(self, job_id: str) -> JobOutcome | None:
        """Return how a job has ended, with its receipt; None for one that runs, and for an unknown id."""

    async def receipt_signature(self, job_id: str) -> ReceiptSignature | None:
        """Return the signature of an ended job's receipt.

        None if the job has not ended, for a journal that is not what was written until an admin accepts that,
        and before the platform has certified the key.
        """

    async def overdue(self) -> tuple[str, ...]:
        """Return the jobs whose reservations may expire, the oldest thousand; some may not be written."""

    async def expire(self, job_id: str) -> None:
        """Return what is reserved for an overdue job that was never written; raises Conflict too early."""

    async def dispute(self, address: str, job_id: str, signature: str) -> JobDispute:
        """Hold what all got for a job that an address paid for, until an admin decides; once.

        Raises NotFound if the address has no such job, Forbidden if it did not sign the dispute, Conflict for
        a job that has not ended (code `job_not_finished`), or of which nothing can be held any more
        (`matured`).
        """

    async def decision(self, job_id: str) -> JobDecision:
        """Return whether a job is disputed, and what an admin decided about it."""

    # Accounts

    async def balance(self, address: str) -> UserBalance:
        """Return a user's balance at one moment."""

    async def earnings(self, address: str) -> WorkerEarnings:
        """Return what a worker's address earned by lending."""

    async def claim_earnings(self, address: str, signature: str) -> None:
        """Note that an address claims its earnings, which are paid out from then on.

        Raises Forbidden if the address did not sign the claim, and where addresses that never had money have
        made too many (code `too_many_claims`).
        """

    async def withdraw(self, withdrawal: Withdrawal, signature: str) -> WithdrawalStatus:
        """Hand a signed withdrawal to the treasury; the same one sent again changes nothing.

        Raises InvalidRequest for an amount that is too small or a time out of range, Forbidden if the address
        did not sign it, InsufficientBalance, RateLimited (`too_many_withdrawals`) after too many in a day,
        and Conflict if the nonce was used for another amount or another withdrawal of the address waits.
        """

    async def withdrawal(self, address: str, nonce: int) -> WithdrawalStatus:
        """Return how far an address's withdrawal has come; raises NotFound for an unknown one."""

    async def enrol_node(
        self, node_id: str, payout: str, *, key_digest: str, name: str, work_bytes_per_s: int
    ) -> None:
        """Have the work of a node be paid to an address; only the key that enrolled the node changes that.

        `work_bytes_per_s` is the most work that the node measured of itself, 0 if it measured nothing; what a
        job says beyond that is held. What was held of the node's work goes to the address. Raises Conflict
        for another key, and for a node that an admin removed, Forbidden where the key has enrolled too many
        (code `too_many_nodes`).
        """

    # The treasury

    async def apply(self, transfer: TreasuryTransfer) -> None:
        """Book what the treasury found on the chain, or sets aside for it, once for each id.

        Of what left the account unknown, the books leave out what a payout of theirs explains. Raises what
        the ledger's rules do, and Conflict (code `payout_open`) while a payout to that address is open.
        """

    async def result(self, transfer_id: str) -> Result | None:
        """Return what a transfer did, None for an id that was never applied."""

    async def owed(self) -> Mapping[str, int]:
        """Return what may be paid out now: address -> lamports, of addresses that claimed their earnings."""

    async def open_payouts(self) -> tuple[OpenPayout, ...]:
        """Return the payouts that money is set aside for."""

    async def numbered(self, since: int) -> tuple[str, ...]:
        """Return the payouts that have a nonce from `since` on, also those that have ended."""

    async def hear_time(self, chain_ms: int) -> None:
        """Tell the books the chain's time, so that no step of their machine's clock has money mature."""

    async def inside(self) -> int:
        """Return how many lamports the platform has to hold on the chain, its own and what it owes."""

    # The signer

    async def view(self, number: int, after: int, findings: tuple[str, ...] = ()) -> BooksView:
        """Return the books at this moment for a signer that last saw entry `number`.

        Its credits are those after entry `after`, up to the entry `credits_until`. `findings` are why the
        signer signs nothing, if that stands: the books show them. Raises JournalFault for a journal that is
        not what was written, and for a ledger that went back until an admin accepts that.
        """

    # All of it

    async def totals(self) -> Totals:
        """Return the sums over all accounts."""

    async def loss(self) -> int:
        """Return by how many writes the ledger went back, until the admin accepts that; 0 if it did not.

        Until then nothing is signed. Raises Unavailable when the books' Redis does not answer, and
        JournalFault (`journal_changed`) when the journal is not what was written.
        """

    async def findings(self) -> tuple[str, ...]:
        """Return why nothing is signed: what is wrong with the journal, or what the signer found.

        It is empty while all agrees. Raises Unavailable as all calls do.
        """

    async def head(self) -> BooksHead:
        """Return the last entry's number and hash."""

    async def held(self) -> HeldMoney:
        """Return the money that waits for an admin's command."""

    async def reversible(self, address: str) -> ReversibleJobs:
        """Return the largest thousand jobs that an address paid for, or was paid for, and can be reversed."""

    async def command(self, text: str) -> None:
        """Carry out an admin's signed command, once; the same one again changes nothing.

        Raises Forbidden for a text that no admin of this network signed, or that has expired, Conflict for a
        nonce that was used, and where the books do not allow it (code `matured` for a job that can not be
        reversed any more, `not_matured` for held money that may be), NotFound for an unknown row in suspense
        or payout.
        """

    async def uncredited(self) -> tuple[Uncredited, ...]:
        """Return the transfers to the platform that were credited to no account, the newest first."""

    async def audit(self, wallet_lamports: int | None = None, since: int = 0) -> Audit:
        """Rebuild the books from their journal and compare them with what is stored.

        `wallet_lamports` is what the platform's wallet holds on the chain, None if that is not compared. The
        audit believes what was sealed up to the entry `since`, which has to be the last one of a seal.
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

    async def treasury_metrics(self) -> tuple[str, MetricsSnapshot] | None:
        """Return the name of the treasury's process and its metrics; None while it is away."""
        return await RedisMetrics(self._redis).read()

    @property
    def _redis(self) -> Redis:
        assert self._treasury_redis is not None, "this caller asks the treasury nothing"
        return self._treasury_redis
