"""The ledger's keys in Redis, and how its values are encoded there."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from azu.errors import LedgerError
from azu.money.ledger.rules import (
    MAX_BALANCE,
    Entry,
    Hold,
    Leg,
    Posting,
    Reservation,
    encode_hold,
    owner_sign,
)
from azu.money.ledger.transfers import Account, decode_transfer, encode_transfer

BALANCES = "azu:ledger:balances"  # hash: account -> lamports
ENTRIES = "azu:ledger:entries"  # hash: transfer id -> number in the journal
HOLDS = "azu:ledger:holds"  # hash: name -> hold
JOURNAL = "azu:ledger:journal"  # stream, the number as its id: at_ms, transfer, legs
EXPIRIES = "azu:ledger:expiries"  # sorted set: open reservations by the time at which they may expire
KEYS = (BALANCES, ENTRIES, HOLDS, JOURNAL, EXPIRIES)

_WHOLE = re.compile(r"-?\d{1,19}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the ledger stores beside its journal, when the journal had `length` entries."""

    balances: Mapping[str, int]
    holds: Mapping[str, Hold]
    numbers: Mapping[str, int]
    expiries: Mapping[str, int]
    length: int


def script_arguments(posting: Posting, found: str, marked_id: str, marked_number: int) -> Iterator[str]:
    """Yield the ARGV of apply.lua; `found` is the hold's text as it was read, empty if there was none.

    `marked_id` and `marked_number` are an entry that the process was answered before, an empty id for none.
    """
    yield posting.transfer.id
    yield encode_transfer(posting.transfer)
    yield json.dumps([[leg.account, str(leg.lamports)] for leg in posting.legs], separators=(",", ":"))
    yield posting.hold_name
    yield found
    yield encode_hold(posting.after) if posting.after else ""
    yield _expiry(posting)
    yield marked_id
    yield str(marked_number)
    for leg in posting.legs:
        yield leg.account
        yield str(leg.lamports)
        change = owner_sign(leg.account) * leg.lamports
        yield from ("least", str(-change)) if change < 0 else ("most", str(MAX_BALANCE - change))


def _expiry(posting: Posting) -> str:
    hold = posting.after
    return str(hold.expires_at_ms) if isinstance(hold, Reservation) and hold.ended_by is None else ""


def entry_from_stream(stream_id: str, fields: Mapping[str, str]) -> Entry:
    """Return the entry of a stream row; raises LedgerError if the row is damaged."""
    try:
        number, _, second = stream_id.partition("-")
        if second != "0":
            raise ValueError(stream_id)
        legs = tuple(Leg(Account(account), int(lamports)) for account, lamports in json.loads(fields["legs"]))
        return Entry(int(number), decode_transfer(fields["transfer"]), legs, int(fields["at_ms"]))
    except (KeyError, ValueError, TypeError) as error:
        raise LedgerError(f"journal entry {stream_id} is damaged: {fields}") from error


def whole_numbers(values: Mapping[str, str]) -> dict[str, int]:
    """Return a stored hash of whole numbers; raises LedgerError with the name of a value that is none."""
    for name, value in values.items():
        if not _WHOLE.fullmatch(value):
            raise LedgerError(f"{name} is stored as {value!r}, which is no whole number")
    return {name: int(value) for name, value in values.items()}
