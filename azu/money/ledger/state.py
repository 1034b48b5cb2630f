"""What the journal amounts to: balances, open holds, keys, nodes, claims, and what may still be reversed.

Nothing of this is stored beside the journal: it is rebuilt from the entries, or from the last seal on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Generic, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from azu.clock import DAY_MS
from azu.errors import LedgerError
from azu.money.ledger.transfers import (
    Deposit,
    EarningsClaimed,
    KeyOpened,
    NodeEnrolled,
    NodeRemoved,
    PayoutPlanned,
    Reserve,
    RevenueTaken,
    Suspended,
    WithdrawalPlanned,
    is_fee,
    is_outside,
)

# How long credits and nonces are kept by name, by the chain's time; it takes a nonce for two days.
KEPT_MS = 30 * 86_400_000
KEPT_DAYS = 30
# A clock that goes back by less stands still until it has come there again.
_STANDS_STILL_MS = 60_000

_Row = TypeVar("_Row")
Credit = Annotated[Deposit | Suspended, Field(discriminator="kind")]
OpenPayout = Annotated[PayoutPlanned | WithdrawalPlanned | RevenueTaken, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Unmatured:
    """What a job paid out: account -> lamports. Until `matures_at_ms` it can go back to the payer."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    payer: str
    matures_at_ms: int
    accounts: dict[str, int]

    @property
    def lamports(self) -> int:
        """All of it together."""
        return sum(self.accounts.values())


@dataclass(slots=True)
class BooksState:
    """The books after an entry of the journal. Only `Draft` changes them; all others read.

    An open hold, a key, a node, a claim and a suspended row are kept as the transfer that made them, without
    the texts that keys were signed for. Accounts that hold nothing are left out.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    balances: dict[str, int] = field(default_factory=dict)
    # Account -> what of its balance has not matured.
    locked: dict[str, int] = field(default_factory=dict)
    reservations: dict[str, Reserve] = field(default_factory=dict)  # by job
    unmatured: dict[str, Unmatured] = field(default_factory=dict)  # by job, in the order of their ends
    disputes: dict[str, Unmatured] = field(default_factory=dict)  # by job
    payouts: dict[str, OpenPayout] = field(default_factory=dict)  # by payout
    nonces: dict[str, str] = field(default_factory=dict)  # nonce -> payout, of the last KEPT_MS
    keys: dict[str, KeyOpened] = field(default_factory=dict)  # by key id
    spent: dict[str, int] = field(default_factory=dict)  # key id -> charges, and open reservations in full
    # "day/address" -> what it paid, and "day/key id" -> the same with open ones in full, of KEPT_DAYS;
    # "day/job" -> what was reserved for it that day, while it is open
    by_day: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, NodeEnrolled] = field(default_factory=dict)  # by node id
    removed: dict[str, NodeRemoved] = field(default_factory=dict)  # by node id
    claims: dict[str, EarningsClaimed] = field(default_factory=dict)  # by address
    suspense: dict[str, Suspended] = field(default_factory=dict)  # by row
    credits: dict[str, Credit] = field(default_factory=dict)  # by entry number, of the last KEPT_MS
    seals: dict[str, str] = field(default_factory=dict)  # the last sealed number -> its file's SHA-256
    # "number" and "at_ms" of the last entry, "nonce": the largest, "row_ms": the time of the last row of the
    # chain, "credited": all that ever arrived, in lamports, "lost": entries, "revenue_left": what left the
    # account of the platform's own, less what its owner put in, in lamports; "maturity_ms", "hold_ms" and
    # "fee_ms": how long something matured, or was reserved for a job, or as a fee, at most.
    facts: dict[str, int] = field(default_factory=dict)

    @property
    def inside(self) -> int:
        """All that azu holds on the chain, its own and what it owes, in lamports."""
        return sum(lamports for account, lamports in self.balances.items() if not is_outside(account))

    @property
    def chain_ms(self) -> int:
        """The chain's time up to which the books have seen it: no clock of a machine reaches it."""
        return max(self.facts.get("nonce", 0), self.facts.get("row_ms", 0))

    def balance(self, account: str) -> int:
        """Return an account's lamports."""
        return self.balances.get(account, 0)

    def free(self, account: str) -> int:
        """Return what of an account's lamports has matured."""
        return self.balance(account) - self.locked.get(account, 0)

    def in_days(self, name: str, now_ms: int, days: int = 1) -> int:
        """Return what `by_day` has of an address or a key, of today (UTC) and the days before."""
        today = now_ms // DAY_MS
        return sum(self.by_day.get(f"{today - ago}/{name}", 0) for ago in range(days))

    def expired(self, now_ms: int) -> list[Reserve]:
        """Return the open reservations that expire up to now, the oldest first."""
        due = [hold for hold in self.reservations.values() if hold.expires_at_ms <= now_ms]
        return sorted(due, key=lambda hold: (hold.expires_at_ms, hold.job_id))


_ADAPTER = TypeAdapter(BooksState)


def encode_state(state: BooksState) -> bytes:
    """Return the state's JSON text."""
    return _ADAPTER.dump_json(state)


def decode_state(content: bytes) -> BooksState:
    """Parse the text of a state; raises LedgerError."""
    try:
        return _ADAPTER.validate_json(content)
    except ValidationError as error:
        raise LedgerError(f"not a state of the books: {content[:200]!r}") from error


class Overlay(Generic[_Row]):
    """Changes to a table, seen through this; the table has them once they are kept."""

    __slots__ = ("_changed", "_table")

    def __init__(self, table: dict[str, _Row]) -> None:
        self._table = table
        self._changed: dict[str, _Row | None] = {}

    def get(self, key: str) -> _Row | None:
        """Return a row, None if there is none."""
        return self._changed[key] if key in self._changed else self._table.get(key)

    def put(self, key: str, row: _Row | None) -> None:
        """Write a row; None removes it."""
        self._changed[key] = row

    def oldest(self) -> Iterator[tuple[str, _Row]]:
        """Yield the table's rows that were not touched, in the order in which they came."""
        for key, row in self._table.items():
            if key not in self._changed:
                yield key, row

    def keep(self) -> None:
        """Move the changes into the table."""
        for key, row in self._changed.items():
            if row is None:
                self._table.pop(key, None)
            else:
                self._table[key] = row
        self._changed.clear()


def longest_hold(job_id: str) -> str:
    """Return the fact that says how long a reservation of its kind was open at most: fees last longer."""
    return "fee_ms" if is_fee(job_id) else "hold_ms"


def add(table: Overlay[int], key: str, lamports: int) -> None:
    """Add to a row of amounts; a row of nothing is left out."""
    table.put(key, (table.get(key) or 0) + lamports or None)


class Draft:
    """Changes to the books that are not in the journal yet: kept as a whole or not at all.

    `at_ms` is the time of all its entries. What has matured by then is unlocked; once kept, what is older
    than KEPT_MS loses its name. Where a clock that was ahead went back, nothing waits for longer from now on
    than what was booked at the right time, and what was counted for days to come is forgotten.
    """

    def __init__(self, state: BooksState, at_ms: int) -> None:
        self.balances = Overlay(state.balances)
        self.locked = Overlay(state.locked)
        self.reservations = Overlay(state.reservations)
        self.unmatured = Overlay(state.unmatured)
        self.disputes = Overlay(state.disputes)
        self.payouts = Overlay(state.payouts)
        self.nonces = Overlay(state.nonces)
        self.keys = Overlay(state.keys)
        self.spent = Overlay(state.spent)
        self.by_day = Overlay(state.by_day)
        self.nodes = Overlay(state.nodes)
        self.removed = Overlay(state.removed)
        self.claims = Overlay(state.claims)
        self.suspense = Overlay(state.suspense)
        self.credits = Overlay(state.credits)
        self.seals = Overlay(state.seals)
        self.facts = Overlay(state.facts)
        is_back = at_ms < self.fact("at_ms") - _STANDS_STILL_MS
        self.at_ms = at_ms if is_back else max(at_ms, self.fact("at_ms"))
        if is_back:
            self._go_back()
        self.facts.put("at_ms", self.at_ms)
        self._mature()

    def keep(self) -> None:
        """Make the changes part of the books."""
        self._keep_all()
        # Afterwards, so that entries leave the same books whether they were kept together or one by one.
        self._forget_old()
        self._keep_all()

    def note_most(self, name: str, value: int) -> None:
        """Keep a fact that is the largest of all values."""
        self.facts.put(name, max(self.fact(name), value))

    def fact(self, name: str) -> int:
        """Return one of the state's facts."""
        return self.facts.get(name) or 0

    def count_today(self, name: str, lamports: int) -> None:
        """Add to what an address, a key or a job has of today."""
        row = f"{self.at_ms // DAY_MS}/{name}"
        self.by_day.put(row, max(0, (self.by_day.get(row) or 0) + lamports) or None)

    def was_today(self, job_id: str) -> bool:
        """Return whether the reservation of a job that ends was made today, and forget when it was."""
        today = self.at_ms // DAY_MS
        is_today = self.by_day.get(f"{today}/{job_id}") is not None
        for day in (today, today - 1):
            self.by_day.put(f"{day}/{job_id}", None)
        return is_today

    def free(self, account: str) -> int:
        """Return what of an account's lamports has matured."""
        return (self.balances.get(account) or 0) - (self.locked.get(account) or 0)

    def lock(self, job_id: str, paid: Unmatured) -> None:
        """Keep what a job paid out where it is until it matures."""
        self.unmatured.put(job_id, paid)
        for account, lamports in paid.accounts.items():
            add(self.locked, account, lamports)

    def unlock(self, job_id: str, paid: Unmatured) -> None:
        """End that: the accounts may be drawn on."""
        self.unmatured.put(job_id, None)
        for account, lamports in paid.accounts.items():
            add(self.locked, account, -lamports)

    def _keep_all(self) -> None:
        for table in vars(self).values():
            if isinstance(table, Overlay):
                table.keep()

    def _mature(self) -> None:
        for job_id, paid in self.unmatured.oldest():
            if paid.matures_at_ms > self.at_ms:
                break
            self.unlock(job_id, paid)

    def _go_back(self) -> None:
        latest_ms = self.at_ms + self.fact("maturity_ms")
        for job_id, paid in self.unmatured.oldest():
            if paid.matures_at_ms > latest_ms:
                self.unmatured.put(job_id, replace(paid, matures_at_ms=latest_ms))
        for job_id, hold in self.reservations.oldest():
            latest_ms = self.at_ms + self.fact(longest_hold(job_id))
            if hold.expires_at_ms > latest_ms:
                self.reservations.put(job_id, replace(hold, expires_at_ms=latest_ms))
        for row, _ in self.by_day.oldest():
            if int(row.partition("/")[0]) > self.at_ms // DAY_MS:
                self.by_day.put(row, None)

    def _forget_old(self) -> None:
        before_ms = max(self.fact("nonce"), self.fact("row_ms")) - KEPT_MS
        for nonce, _ in self.nonces.oldest():
            if int(nonce) >= before_ms:
                break
            self.nonces.put(nonce, None)
        for number, credit in self.credits.oldest():
            if credit.at_ms >= before_ms:
                break
            self.credits.put(number, None)
        first = self.at_ms // DAY_MS - KEPT_DAYS
        for row, _ in self.by_day.oldest():
            if int(row.partition("/")[0]) > first:
                break
            self.by_day.put(row, None)
