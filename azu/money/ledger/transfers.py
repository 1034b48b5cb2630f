"""Everything that can happen to money: immutable transfers, and the accounts between which money moves.

A caller fixes a transfer's id before it sends the transfer, so that it is always safe to send it again. From
the transfer and the hold that it opens or ends, the rules know which accounts change. Every constructor
raises LedgerError for an amount, address or id that is out of range.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NewType

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from azu.addresses import ADDRESS_PATTERN
from azu.errors import LedgerError
from azu.units import MAX_LAMPORTS

Account = NewType("Account", str)

CHAIN = Account("chain")
PLATFORM = Account("platform")
# Redis sorts by doubles, which skip whole numbers beyond this.
MAX_TIME_MS = 2**53

_ADDRESS = re.compile(ADDRESS_PATTERN)
_ACCOUNT = re.compile(
    rf"chain|platform|user:{ADDRESS_PATTERN}:(available|reserved|withdrawing)"
    rf"|worker:{ADDRESS_PATTERN}:(earned|paying|paid)"
)
_ID = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deposit:
    """HYPE arrived on the chain from `address`; the id contains the chain's hash of the transfer."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    address: str
    lamports: int
    kind: Literal["deposit"] = "deposit"

    def __post_init__(self) -> None:
        _check_ids(self.id)
        checked_address(self.address)
        _check_amounts(self.lamports, at_least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Set aside the most that a job can cost; from `expires_at_ms` on a lost job's reservation may expire."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    address: str
    job_id: str
    lamports: int
    expires_at_ms: int
    kind: Literal["reserve"] = "reserve"

    def __post_init__(self) -> None:
        _check_ids(self.id, self.job_id)
        checked_address(self.address)
        _check_amounts(self.lamports)
        _check_amounts(self.expires_at_ms, at_most=MAX_TIME_MS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """End a job's reservation: the charge to platform and workers, the rest back to the user.

    `shares` maps payout address -> lamports; platform and shares sum to the charge.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    job_id: str
    charged_lamports: int
    platform_lamports: int
    shares: Mapping[str, int]
    kind: Literal["settle"] = "settle"

    def __post_init__(self) -> None:
        _check_ids(self.id, self.job_id)
        for payout in self.shares:
            checked_address(payout)
        _check_amounts(self.charged_lamports, self.platform_lamports, *self.shares.values())
        if self.platform_lamports + sum(self.shares.values()) != self.charged_lamports:
            raise LedgerError(f"{self.id}: platform and shares do not sum to {self.charged_lamports}")
        # A sorted copy: equal transfers have equal bytes, and the caller may change its mapping.
        object.__setattr__(self, "shares", dict(sorted(self.shares.items())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """End a job's reservation without a charge."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    job_id: str
    kind: Literal["release"] = "release"

    def __post_init__(self) -> None:
        _check_ids(self.id, self.job_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire:
    """End a lost job's reservation after its time; the caller has compared the time with the clock."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    job_id: str
    kind: Literal["expire"] = "expire"

    def __post_init__(self) -> None:
        _check_ids(self.id, self.job_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutPlanned:
    """Set aside what a worker earned, to send it to the worker's wallet."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    payout_id: str
    address: str
    lamports: int
    kind: Literal["payout_planned"] = "payout_planned"

    def __post_init__(self) -> None:
        _check_ids(self.id, self.payout_id)
        checked_address(self.address)
        _check_amounts(self.lamports, at_least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawalPlanned:
    """Set aside what a user has available, to send it to the user's wallet; from then on it is a payout."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    payout_id: str
    address: str
    lamports: int
    kind: Literal["withdrawal_planned"] = "withdrawal_planned"

    def __post_init__(self) -> None:
        _check_ids(self.id, self.payout_id)
        checked_address(self.address)
        _check_amounts(self.lamports, at_least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutPaid:
    """The chain's ledger shows the payout; the chain kept `fee_lamports` of it in HYPE."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    payout_id: str
    fee_lamports: int = 0
    kind: Literal["payout_paid"] = "payout_paid"

    def __post_init__(self) -> None:
        _check_ids(self.id, self.payout_id)
        _check_amounts(self.fee_lamports)


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutRefused:
    """The chain will never execute the payout: the money goes back to where it came from."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    id: str
    payout_id: str
    kind: Literal["payout_refused"] = "payout_refused"

    def __post_init__(self) -> None:
        _check_ids(self.id, self.payout_id)


Transfer = (
    Deposit
    | Reserve
    | Settle
    | Release
    | Expire
    | PayoutPlanned
    | WithdrawalPlanned
    | PayoutPaid
    | PayoutRefused
)

_ADAPTER: TypeAdapter[Transfer] = TypeAdapter(Annotated[Transfer, Field(discriminator="kind")])


def encode_transfer(transfer: Transfer) -> str:
    """Return the transfer's one JSON text: equal transfers give equal texts."""
    return _ADAPTER.dump_json(transfer).decode()


def decode_transfer(content: str) -> Transfer:
    """Parse the text of a transfer; raises LedgerError."""
    try:
        return _ADAPTER.validate_json(content)
    except ValidationError as error:
        raise LedgerError(f"not a transfer: {content[:200]!r}") from error


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


def _check_ids(*ids: str) -> None:
    for one in ids:
        if not _ID.fullmatch(one):
            raise LedgerError(f"{one!r} is not an id of 1 to 200 printable characters without spaces")


def _check_amounts(*amounts: int, at_least: int = 0, at_most: int = MAX_LAMPORTS) -> None:
    for amount in amounts:
        # bool is an int to Python, and a float would pass the comparison.
        if type(amount) is not int or not at_least <= amount <= at_most:
            raise LedgerError(f"{amount!r} is not a whole number from {at_least} to {at_most}")
