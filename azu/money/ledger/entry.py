"""A line of the journal: a transfer, and what it did to the accounts."""

from dataclasses import dataclass, field

from azu.errors import TransferConflict
from azu.money.ledger.transfers import Account, AnyTransfer, Transfer


@dataclass(frozen=True, slots=True)
class Leg:
    """One account's change: lamports above zero are credited, below zero debited."""

    account: Account
    lamports: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the journal. `number` counts from 1 without gaps; `at_ms` is when it was written, or 0.

    `hash` is over the entry and the hash before it.
    """

    number: int
    transfer: AnyTransfer
    legs: tuple[Leg, ...]
    at_ms: int = field(default=0, compare=False)
    hash: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Result:
    """What a transfer did; `repeated` if it was applied before and nothing changed this time."""

    entry: Entry
    repeated: bool = False


def repeat(known: Entry, transfer: Transfer) -> Result:
    """Return the result of a transfer whose id is known; raises TransferConflict for other content."""
    if known.transfer != transfer:
        raise TransferConflict(f"{transfer.id} was used before for another transfer")
    return Result(known, repeated=True)
