"""The ledger's rules over an immutable state; the Redis adapter answers the same to the same transfers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from azu.errors import AzuError, InsufficientBalance, LedgerError, TransferConflict
from azu.ledger.accounts import CHAIN
from azu.ledger.holds import Hold
from azu.ledger.posting import Leg, Posting, hold_name, post
from azu.ledger.transfers import Reserve, Transfer, WithdrawalPlanned

# The largest amount that a Redis counter holds.
MAX_BALANCE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the journal. `number` counts from 1 without gaps; `at_ms` is when Redis wrote it, else 0."""

    number: int
    transfer: Transfer
    legs: tuple[Leg, ...]
    at_ms: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Result:
    """What a transfer did; `repeated` if it was done before and nothing changed this time."""

    entry: Entry
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """All balances, holds by name and entries by transfer id, these in the order of the journal."""

    balances: Mapping[str, int] = field(default_factory=dict)
    holds: Mapping[str, Hold] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)


def apply(state: State, transfer: Transfer) -> tuple[State, Result]:
    """Apply a transfer once; a repeated one is answered with its first result.

    Raises TransferConflict for a known id with other content, InsufficientBalance if a user has too
    little, LedgerError for what no caller should ask. Then nothing has changed.
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
    return State(balances, holds, {**state.entries, transfer.id: entry}), Result(entry)


def repeat(known: Entry, transfer: Transfer) -> Result:
    """Answer a transfer whose id is known; raises TransferConflict if its content is another."""
    if known.transfer != transfer:
        raise TransferConflict(f"{transfer.id} was used before for another transfer")
    return Result(known, repeated=True)


def booked(balances: Mapping[str, int], posting: Posting) -> dict[str, int]:
    """Return the balances that a posting changes; raises what `refusal` says if one of them may not be."""
    changed: dict[str, int] = {}
    for leg in posting.legs:
        balance = balances.get(leg.account, 0)
        if not 0 <= owner_sign(leg.account) * (balance + leg.lamports) <= MAX_BALANCE:
            raise refusal(posting.transfer, leg, balance)
        changed[leg.account] = balance + leg.lamports
    return changed


def owner_sign(account: str) -> int:
    """Return 1 for accounts that may not be below zero, -1 for the chain's, which may not be above it."""
    return -1 if account == CHAIN else 1


def refusal(transfer: Transfer, leg: Leg, balance: int) -> AzuError:
    """Return the error for a leg that its account's balance does not bear."""
    if isinstance(transfer, Reserve | WithdrawalPlanned) and leg.lamports < 0:
        return InsufficientBalance(f"the account holds {balance} lamports; this may take {-leg.lamports}")
    return LedgerError(f"{leg.account} at {balance} lamports does not bear {leg.lamports} by {transfer.id}")
