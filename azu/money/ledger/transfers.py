"""Everything that can happen to money: immutable transfers, and the accounts between which money moves.

A caller fixes a transfer's id before it sends the transfer, so that it is always safe to send it again. From
the transfer and the state that it finds, the rules know which accounts change. Every constructor raises
LedgerError for an amount, address, id or text that is out of range.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, NewType

from pydantic import ConfigDict, Field, TypeAdapter

from azu.addresses import ADDRESS_PATTERN
from azu.errors import LedgerError
from azu.units import MAX_LAMPORTS

Account = NewType("Account", str)

CHAIN = Account("chain")
PLATFORM = Account("platform")
PLATFORM_PAYING = Account("platform:paying")
SUSPENSE = Account("suspense")
HELD = Account("held")
# The chain's times and nonces are milliseconds; a double counts them exactly up to here.
MAX_TIME_MS = 2**53
MAX_OUTCOME_BYTES = 8192
# Far above any model; a charge is divided layer by layer while all other calls wait.
MAX_LAYERS = 1024
# A job's shares go to so many at most: each of them may be a new account.
MAX_SHARES = 1000

_ADDRESS = re.compile(ADDRESS_PATTERN)
_ID = re.compile(r"[!-~]{1,200}")
_ACCOUNT = re.compile(
    rf"chain|platform|platform:paying|suspense|held|held:{_ID.pattern}"
    rf"|user:{ADDRESS_PATTERN}:(available|reserved|withdrawing)|worker:{ADDRESS_PATTERN}:(earned|paying|paid)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """What all transfers share. The name of a field says which values it may have, see `_CHECKS`."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str

    def __post_init__(self) -> None:
        for name, check in _checks_of(type(self)):
            check(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Deposit(Movement):
    """HYPE arrived on the chain from `address`, at the chain's time `at_ms`; the id contains the hash."""

    address: str
    lamports: int
    at_ms: int
    kind: Literal["deposit"] = "deposit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspended(Movement):
    """HYPE arrived on the chain that belongs to no user yet; `row` names the chain's row."""

    sender: str
    lamports: int
    row: str
    at_ms: int
    kind: Literal["suspended"] = "suspended"


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspenseCredited(Movement):
    """A suspended row turned out to be of `address`; `command` is the signed text that says so."""

    row: str
    address: str
    lamports: int
    command: str
    kind: Literal["suspense_credited"] = "suspense_credited"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownOut(Movement):
    """HYPE left the platform's wallet to `address`, and no payout says so: the address has it already."""

    address: str
    lamports: int
    nonce: int
    kind: Literal["unknown_out"] = "unknown_out"


def is_fee(job_id: str) -> bool:
    """Return whether a reservation's id is that of a fee for a model, which no job has."""
    return job_id.startswith("fetch-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve(Movement):
    """Set aside the most that a job can cost; from `expires_at_ms` on a lost job's reservation may expire.

    The price that stands here is the job's price until its end. `max_tokens` counts all choices together.
    `reserved_at_ms` is 0 in old entries.
    """

    address: str
    job_id: str
    expires_at_ms: int
    key_id: str
    model_id: str
    revision: str
    num_layers: int
    lamports_per_token_layer: int
    platform_percent: int
    prompt_tokens: int
    max_tokens: int
    reserved_at_ms: int = 0
    kind: Literal["reserve"] = "reserve"

    def __post_init__(self) -> None:
        Movement.__post_init__(self)
        _SUM("lamports", self.lamports)

    @property
    def lamports(self) -> int:
        """The most that the job can cost: what is set aside."""
        return self.price_of(self.prompt_tokens + self.max_tokens)

    def price_of(self, tokens: int) -> int:
        """Return what this many tokens cost in this job, in lamports."""
        return tokens * self.num_layers * self.lamports_per_token_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle(Movement):
    """End a job's reservation: the charge to platform and workers, the rest back to the user.

    `shares` maps payout address -> lamports, and `held` node id -> lamports that no address may have yet;
    platform, shares and held money sum to the charge. `by_node` is what each node's work is worth, for the
    receipt. All of it may be reversed for `maturity_ms`. `outcome` is text of the jobs' room.
    """

    job_id: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    charged_lamports: int
    platform_lamports: int
    shares: Mapping[str, int]
    held: Mapping[str, int] = field(default_factory=dict)
    by_node: Mapping[str, int] = field(default_factory=dict)
    maturity_ms: int = 0
    outcome: str = ""
    kind: Literal["settle"] = "settle"

    def __post_init__(self) -> None:
        # Sorted copies: equal transfers have equal bytes, and the caller may change its mappings.
        for name in ("shares", "held", "by_node"):
            object.__setattr__(self, name, dict(sorted(getattr(self, name).items())))
        Movement.__post_init__(self)
        shared = sum(self.shares.values()) + sum(self.held.values())
        if self.platform_lamports + shared != self.charged_lamports:
            raise LedgerError(f"{self.id}: platform and shares do not sum to {self.charged_lamports}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Movement):
    """End a job's reservation without a charge."""

    job_id: str
    outcome: str = ""
    kind: Literal["release"] = "release"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire(Movement):
    """End a lost job's reservation after its time; the caller has compared the time with the clock."""

    job_id: str
    kind: Literal["expire"] = "expire"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disputed(Movement):
    """The owner of the key that paid disputes a job: its shares are held until an admin decides."""

    job_id: str
    signature: str
    kind: Literal["disputed"] = "disputed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DisputeDismissed(Movement):
    """A disputed job was right: its shares go back to those who earned them."""

    job_id: str
    command: str
    kind: Literal["dispute_dismissed"] = "dispute_dismissed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reversed(Movement):
    """What a job paid out goes back to its payer, while it has not matured or is disputed."""

    job_id: str
    command: str
    kind: Literal["reversed"] = "reversed"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPaid(Movement):
    """Held money of a node goes to a payout address: that of the enrolled node, or as a command says."""

    node_id: str
    address: str
    lamports: int
    command: str = ""
    kind: Literal["held_paid"] = "held_paid"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldReleased(Movement):
    """Held money of a node goes back to a user, as a command says."""

    node_id: str
    address: str
    lamports: int
    command: str
    kind: Literal["held_released"] = "held_released"


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutPlanned(Movement):
    """Set aside what a worker earned, to send it to the worker's wallet under this nonce and no other."""

    payout_id: str
    address: str
    lamports: int
    nonce: int
    kind: Literal["payout_planned"] = "payout_planned"


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawalPlanned(Movement):
    """Set aside what a user has available, to send it to the user's wallet; from then on it is a payout.

    `signature` and `expires_at_ms` are of the user's own signed withdrawal.
    """

    payout_id: str
    address: str
    lamports: int
    nonce: int
    expires_at_ms: int
    signature: str
    kind: Literal["withdrawal_planned"] = "withdrawal_planned"


@dataclass(frozen=True, slots=True, kw_only=True)
class RevenueTaken(Movement):
    """Set aside the platform's own money, to send it where a signed command says; then it is a payout."""

    payout_id: str
    address: str
    lamports: int
    nonce: int
    command: str
    kind: Literal["revenue_taken"] = "revenue_taken"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCovered(Movement):
    """An admin gives the platform what he has available, to pay for what is missing, as a command says."""

    address: str
    lamports: int
    command: str
    kind: Literal["loss_covered"] = "loss_covered"


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutPaid(Movement):
    """The chain's ledger shows the payout, or an admin says so; it kept `fee_lamports` of it in HYPE."""

    payout_id: str
    fee_lamports: int = 0
    command: str = ""
    kind: Literal["payout_paid"] = "payout_paid"


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutRefused(Movement):
    """The chain will never execute the payout: the money goes back to where it came from."""

    payout_id: str
    kind: Literal["payout_refused"] = "payout_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyOpened(Movement):
    """A key may spend its address's money within its limit; `signature` is the address's, of `text`."""

    key_id: str
    digest: str
    address: str
    label: str
    created_at_ms: int
    expires_at_ms: int | None = None
    spend_limit_lamports: int | None = None
    text: str = ""
    signature: str = ""
    kind: Literal["key_opened"] = "key_opened"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRevoked(Movement):
    """A key is good for nothing any more."""

    key_id: str
    kind: Literal["key_revoked"] = "key_revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEnrolled(Movement):
    """A node's work is paid to `payout`; only the holder of the key with this digest changes that."""

    node_id: str
    payout: str
    key_digest: str
    name: str
    work_bytes_per_s: int
    kind: Literal["node_enrolled"] = "node_enrolled"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRemoved(Movement):
    """A node's work is held from now on, and the node is never enrolled again, as a command says."""

    node_id: str
    command: str
    kind: Literal["node_removed"] = "node_removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class EarningsClaimed(Movement):
    """An address signed that it wants to be paid what it earns."""

    address: str
    signature: str
    kind: Literal["earnings_claimed"] = "earnings_claimed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformReplaced(Movement):
    """The platform's address `old` is `new`: both keys signed it. What the old one holds stays azu's."""

    old: str
    new: str
    by_old: str
    by_new: str
    kind: Literal["platform_replaced"] = "platform_replaced"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterOpened(Movement):
    """A process took the ledger over: every other one that still writes is refused from here on."""

    kind: Literal["writer_opened"] = "writer_opened"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalSealed(Movement):
    """The entries up to `through` lie in a file with this SHA-256, and the state after them at its end."""

    through: int
    sha256: str
    kind: Literal["journal_sealed"] = "journal_sealed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossNoted(Movement):
    """The store knew this many entries less than it had answered."""

    num_entries: int
    kind: Literal["loss_noted"] = "loss_noted"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossAccepted(Movement):
    """An admin has checked the books against the chain after a loss of this size."""

    num_entries: int
    command: str = ""
    kind: Literal["loss_accepted"] = "loss_accepted"


PlannedPayout = PayoutPlanned | WithdrawalPlanned | RevenueTaken
Transfer = (
    Deposit
    | Suspended
    | SuspenseCredited
    | UnknownOut
    | Reserve
    | Settle
    | Release
    | Expire
    | Disputed
    | DisputeDismissed
    | Reversed
    | HeldPaid
    | HeldReleased
    | PayoutPlanned
    | WithdrawalPlanned
    | RevenueTaken
    | PayoutPaid
    | PayoutRefused
    | KeyOpened
    | KeyRevoked
    | NodeEnrolled
    | NodeRemoved
    | EarningsClaimed
    | PlatformReplaced
    | WriterOpened
    | JournalSealed
    | LossNoted
    | LossAccepted
    | LossCovered
)
AnyTransfer = Annotated[Transfer, Field(discriminator="kind")]

_ADAPTER: TypeAdapter[Transfer] = TypeAdapter(AnyTransfer)


def encode_transfer(transfer: Transfer) -> str:
    """Return the transfer's one JSON text: equal transfers give equal texts."""
    return _ADAPTER.dump_json(transfer).decode()


def user_available(address: str) -> Account:
    """Return the account of what a user may spend or withdraw."""
    return Account(f"user:{checked_address(address)}:available")


def user_reserved(address: str) -> Account:
    """Return the account of what a user's open jobs hold."""
    return Account(f"user:{checked_address(address)}:reserved")


def user_withdrawing(address: str) -> Account:
    """Return the account of what is on its way to a user's wallet."""
    return Account(f"user:{checked_address(address)}:withdrawing")


def worker_earned(address: str) -> Account:
    """Return the account of what a worker earned and no payout has taken yet."""
    return Account(f"worker:{checked_address(address)}:earned")


def worker_paying(address: str) -> Account:
    """Return the account of what is on its way to a worker's wallet."""
    return Account(f"worker:{checked_address(address)}:paying")


def worker_paid(address: str) -> Account:
    """Return the account of what all payouts together brought to a worker's wallet."""
    return Account(f"worker:{checked_address(address)}:paid")


def node_held(node_id: str) -> Account:
    """Return the account of what a node's work is worth and no payout address may have yet."""
    _check_id("node_id", node_id)
    return Account(f"held:{node_id}")


def is_node_held(account: str) -> bool:
    """Whether an account has what is held of one node's work."""
    return account.startswith(f"{HELD}:")


def is_account(name: str) -> bool:
    """Whether a name is that of an account."""
    return _ACCOUNT.fullmatch(name) is not None


def is_outside(account: str) -> bool:
    """Whether an account stands for money that azu does not hold."""
    return account == CHAIN or account.endswith(":paid")


def is_in_transit(account: str) -> bool:
    """Whether an account stands for money that may be on the chain already."""
    return account.endswith((":paying", ":withdrawing"))


def checked_address(address: str) -> str:
    """Return the address; raises LedgerError unless it is lower-case 0x and 40 hex digits."""
    if not _ADDRESS.fullmatch(address):
        raise LedgerError(f"{address!r} is not a lower-case address of 0x and 40 hex digits")
    return address


def _check_id(name: str, value: Any) -> None:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise LedgerError(f"{name} {value!r} is not an id of 1 to 200 printable characters without spaces")


def _check_address(_: str, value: str) -> None:
    checked_address(value)


def _whole_number(at_least: int, at_most: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        # bool is an int to Python, and a float would pass the comparison.
        if type(value) is not int or not at_least <= value <= at_most:
            raise LedgerError(f"{name} {value!r} is not a whole number from {at_least} to {at_most}")

    return check


def _text(at_most: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or len(value.encode("utf-8", "surrogatepass")) > at_most:
            raise LedgerError(f"{name} is not a text of at most {at_most} bytes")

    return check


def _optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    return lambda name, value: None if value is None else check(name, value)


_AMOUNT, _SUM, _TIME, _COUNT = (
    _whole_number(1, MAX_LAMPORTS),
    _whole_number(0, MAX_LAMPORTS),
    _whole_number(0, MAX_TIME_MS),
    _whole_number(0, 2**63 - 1),
)


def _shared(check: Callable[[str, str], None]) -> Callable[[str, Any], None]:
    def check_all(name: str, value: Mapping[str, int]) -> None:
        if len(value) > MAX_SHARES:
            raise LedgerError(f"{name} has {len(value)} shares, and not at most {MAX_SHARES}")
        for key, lamports in value.items():
            check(name, key)
            _SUM(name, lamports)

    return check_all


_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(("id", "job_id", "key_id", "node_id", "payout_id", "row"), _check_id),
    **dict.fromkeys(("address", "sender", "payout", "old", "new"), _check_address),
    "lamports": _AMOUNT,
    "spend_limit_lamports": _optional(_SUM),
    **dict.fromkeys(("charged_lamports", "fee_lamports", "platform_lamports"), _SUM),
    "lamports_per_token_layer": _SUM,
    "platform_percent": _whole_number(0, 100),
    **dict.fromkeys(("at_ms", "created_at_ms", "maturity_ms", "nonce", "reserved_at_ms"), _TIME),
    "expires_at_ms": _TIME,
    **dict.fromkeys(("completion_tokens", "max_tokens", "num_entries", "prompt_tokens", "through"), _COUNT),
    "num_layers": _whole_number(0, MAX_LAYERS),
    "work_bytes_per_s": _COUNT,
    "shares": _shared(_check_address),
    **dict.fromkeys(("by_node", "held"), _shared(_check_id)),
    **dict.fromkeys(("digest", "key_digest", "sha256"), _text(64)),
    **dict.fromkeys(("label", "model_id", "name", "revision"), _text(512)),
    **dict.fromkeys(("command", "signature", "text", "by_old", "by_new"), _text(2048)),
    "outcome": _text(MAX_OUTCOME_BYTES),
}


# A key may be good for ever.
_OF_ONE_KIND: Mapping[tuple[type[Movement], str], Callable[[str, Any], None]] = {
    (KeyOpened, "expires_at_ms"): _optional(_TIME)
}


_Checks = tuple[tuple[str, Callable[[str, Any], None]], ...]
_checks: dict[type[Movement], _Checks] = {}


def _checks_of(kind: type[Movement]) -> _Checks:
    if kind not in _checks:
        names = [one.name for one in fields(kind) if one.name != "kind"]
        _checks[kind] = tuple((name, _OF_ONE_KIND.get((kind, name)) or _CHECKS[name]) for name in names)
    return _checks[kind]
