"""The ledger's rules over an immutable state: double entry, holds, and what may never happen.

RedisLedger applies the same rules, and gives the same answers to the same transfers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from azu.errors import AzuError, InsufficientBalance, LedgerError, TransferConflict
from azu.money.ledger.transfers import (
    CHAIN,
    PLATFORM,
    Account,
    Deposit,
    Expire,
    PayoutPaid,
    PayoutPlanned,
    PayoutRefused,
    Release,
    Reserve,
    Settle,
    Transfer,
    WithdrawalPlanned,
    user_available,
    user_reserved,
    user_withdrawing,
    worker_earned,
    worker_paid,
    worker_paying,
)

# The largest amount that a Redis counter holds.
MAX_BALANCE = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What a job holds of its user's money; `ended_by` is the id of the transfer that ended the hold."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    job_id: str
    address: str
    lamports: int
    expires_at_ms: int
    ended_by: str | None = None
    kind: Literal["reservation"] = "reservation"

    @property
    def source(self) -> Account:
        """The account that the money came from and goes back to."""
        return user_available(self.address)

    @property
    def account(self) -> Account:
        """The account that has the money while the hold is open."""
        return user_reserved(self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutHold:
    """Money on its way to the wallet of a worker, or of a user who withdraws."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    payout_id: str
    address: str
    lamports: int
    payee: Literal["worker", "user"]
    ended_by: str | None = None
    kind: Literal["payout"] = "payout"

    @property
    def source(self) -> Account:
        """The account that the money came from and goes back to."""
        return worker_earned(self.address) if self.payee == "worker" else user_available(self.address)

    @property
    def account(self) -> Account:
        """The account that has the money while the hold is open."""
        return worker_paying(self.address) if self.payee == "worker" else user_withdrawing(self.address)


Hold = Reservation | PayoutHold


@dataclass(frozen=True, slots=True)
class Leg:
    """One account's change: lamports above zero are credited, below zero debited."""

    account: Account
    lamports: int


@dataclass(frozen=True, slots=True)
class Posting:
    """A transfer worked out against the hold it found: legs of distinct accounts that sum to zero.

    `hold_name` is empty for transfers without a hold; otherwise the hold becomes `after`, provided that it
    did not change since the posting was worked out.
    """

    transfer: Transfer
    legs: tuple[Leg, ...]
    hold_name: str = ""
    after: Hold | None = None

    def __post_init__(self) -> None:
        assert sum(leg.lamports for leg in self.legs) == 0
        assert len({leg.account for leg in self.legs}) == len(self.legs)


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the journal. `number` counts from 1 without gaps; `at_ms` is when it was written, or 0.

    `hash` is over the entry and the hash before it.
    """

    number: int
    transfer: Transfer
    legs: tuple[Leg, ...]
    at_ms: int = field(default=0, compare=False)
    hash: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Result:
    """What a transfer did; `repeated` if it was applied before and nothing changed this time."""

    entry: Entry
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class LedgerState:
    """All balances, holds by name, and entries by transfer id in the order of the journal."""

    balances: Mapping[str, int] = field(default_factory=dict)
    holds: Mapping[str, Hold] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)


def apply(state: LedgerState, transfer: Transfer) -> tuple[LedgerState, Result]:
    """Apply a transfer once; return the first result for a repeated one.

    Raises TransferConflict for a known id with other content, InsufficientBalance if a user's account has too
    little, LedgerError for every other transfer that the rules do not allow. Then nothing has changed.
    """
    known = state.entries.get(transfer.id)
    if known is not None:
        return state, repeat(known, transfer)
    posting = post(transfer, state.holds.get(hold_name(transfer)))
    balances = {**state.balances, **booked(state.balances, posting)}
    entry = Entry(len(state.entries) + 1, transfer, posting.legs)
    holds = dict(state.holds)
    if posting.after is not None:
        holds[posting.hold_name] = posting.after
    return LedgerState(balances, holds, {**state.entries, transfer.id: entry}), Result(entry)


def repeat(known: Entry, transfer: Transfer) -> Result:
    """Return the result of a transfer whose id is known; raises TransferConflict for other content."""
    if known.transfer != transfer:
        raise TransferConflict(f"{transfer.id} was used before for another transfer")
    return Result(known, repeated=True)


def booked(balances: Mapping[str, int], posting: Posting) -> dict[str, int]:
    """Return the balances that a posting changes; raises `refusal` if one of them would be out of range."""
    changed: dict[str, int] = {}
    for leg in posting.legs:
        balance = balances.get(leg.account, 0)
        if not 0 <= owner_sign(leg.account) * (balance + leg.lamports) <= MAX_BALANCE:
            raise refusal(posting.transfer, leg, balance)
        changed[leg.account] = balance + leg.lamports
    return changed


def owner_sign(account: str) -> int:
    """Return 1 for accounts that may not be below zero, -1 for the chain's, which may not be above zero."""
    return -1 if account == CHAIN else 1


def refusal(transfer: Transfer, leg: Leg, balance: int) -> AzuError:
    """Return the error for a leg that its account's balance does not allow."""
    if isinstance(transfer, Reserve | WithdrawalPlanned) and leg.lamports < 0:
        return InsufficientBalance(f"the account holds {balance} lamports; this may take {-leg.lamports}")
    return LedgerError(f"{leg.account} at {balance} lamports does not allow {leg.lamports} by {transfer.id}")


def post(transfer: Transfer, found: Hold | None) -> Posting:
    """Work out a transfer against the hold that is stored under its name, None if there is none.

    Raises LedgerError: code `unknown_hold` or `hold_ended` if the transfer cannot end the hold, `hold_exists`
    if it cannot open it.
    """
    match transfer:
        case Deposit():
            arrived = transfer.lamports
            return Posting(transfer, _legs({CHAIN: -arrived, user_available(transfer.address): arrived}))
        case Reserve() | PayoutPlanned() | WithdrawalPlanned():
            return _open(transfer, found)
        case Settle():
            return _settle(transfer, found)
        case PayoutPaid():
            return _paid(transfer, found)
        case Release() | Expire() | PayoutRefused():
            hold = _still_open(transfer, found)
            return _end(transfer, hold, {hold.source: hold.lamports})
    raise LedgerError(f"{transfer.id}: this ledger books no {transfer.kind}")


def _open(transfer: Reserve | PayoutPlanned | WithdrawalPlanned, found: Hold | None) -> Posting:
    name = hold_name(transfer)
    if found is not None:
        raise LedgerError(f"{transfer.id}: {name} was opened before", code="hold_exists")
    hold = _new_hold(transfer)
    legs = _legs({hold.source: -hold.lamports, hold.account: hold.lamports})
    return Posting(transfer, legs, name, hold)


def _new_hold(transfer: Reserve | PayoutPlanned | WithdrawalPlanned) -> Hold:
    if isinstance(transfer, Reserve):
        return Reservation(
            job_id=transfer.job_id,
            address=transfer.address,
            lamports=transfer.lamports,
            expires_at_ms=transfer.expires_at_ms,
        )
    return PayoutHold(
        payout_id=transfer.payout_id,
        address=transfer.address,
        lamports=transfer.lamports,
        payee="worker" if isinstance(transfer, PayoutPlanned) else "user",
    )


def _settle(transfer: Settle, found: Hold | None) -> Posting:
    hold = _still_open(transfer, found)
    if transfer.charged_lamports > hold.lamports:
        raise LedgerError(
            f"{transfer.id} charges {transfer.charged_lamports} of {hold.lamports} reserved lamports"
        )
    return _end(
        transfer,
        hold,
        {
            PLATFORM: transfer.platform_lamports,
            **{worker_earned(payout): lamports for payout, lamports in transfer.shares.items()},
            hold.source: hold.lamports - transfer.charged_lamports,
        },
    )


def _paid(transfer: PayoutPaid, found: Hold | None) -> Posting:
    hold = _still_open(transfer, found)
    if transfer.fee_lamports > hold.lamports:
        raise LedgerError(f"{transfer.id}: a fee of {transfer.fee_lamports} on {hold.lamports} lamports")
    assert isinstance(hold, PayoutHold)
    if hold.payee == "user":
        return _end(transfer, hold, {CHAIN: hold.lamports})
    arrived = hold.lamports - transfer.fee_lamports
    return _end(transfer, hold, {worker_paid(hold.address): arrived, CHAIN: transfer.fee_lamports})


def _still_open(transfer: Transfer, found: Hold | None) -> Hold:
    if found is None:
        raise LedgerError(f"{transfer.id}: there is no {hold_name(transfer)}", code="unknown_hold")
    if found.ended_by is not None:
        raise LedgerError(
            f"{transfer.id}: {hold_name(transfer)} was ended by {found.ended_by}", code="hold_ended"
        )
    return found


def _end(transfer: Transfer, hold: Hold, credits_: dict[Account, int]) -> Posting:
    legs = _legs({hold.account: -hold.lamports, **credits_})
    return Posting(transfer, legs, hold_name(transfer), replace(hold, ended_by=transfer.id))


def _legs(changes: dict[Account, int]) -> tuple[Leg, ...]:
    return tuple(Leg(account, lamports) for account, lamports in changes.items() if lamports)


def hold_name(transfer: Transfer) -> str:
    """Return the name of the hold that the transfer opens or ends; empty if it does neither."""
    match transfer:
        case Deposit():
            return ""
        case Reserve() | Settle() | Release() | Expire():
            return reservation_name(transfer.job_id)
        case PayoutPlanned() | WithdrawalPlanned() | PayoutPaid() | PayoutRefused():
            return payout_name(transfer.payout_id)
    raise LedgerError(f"{transfer.id}: this ledger books no {transfer.kind}")


def reservation_name(job_id: str) -> str:
    """Return the name under which a job's reservation is stored."""
    return f"job:{job_id}"


def payout_name(payout_id: str) -> str:
    """Return the name under which a payout is stored."""
    return f"payout:{payout_id}"


_ADAPTER: TypeAdapter[Hold] = TypeAdapter(Annotated[Hold, Field(discriminator="kind")])


def encode_hold(hold: Hold) -> str:
    """Return the hold's one JSON text."""
    return _ADAPTER.dump_json(hold).decode()


def decode_hold(content: str) -> Hold:
    """Parse the text of a hold; raises LedgerError."""
    try:
        return _ADAPTER.validate_json(content)
    except ValidationError as error:
        raise LedgerError(f"not a hold: {content[:200]!r}") from error
