"""The proof that the books are right: the rules replay every entry, and the result is compared."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields

from azu.clock import wall_clock_ms
from azu.errors import AzuError, LedgerError
from azu.money.ledger.journal import BEGIN, Head, RedisJournal, follow
from azu.money.ledger.records import Snapshot
from azu.money.ledger.rules import Entry, Hold, Reservation, booked, hold_name, owner_sign, post
from azu.money.ledger.seals import Seals
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import CHAIN, PLATFORM, is_account, is_in_transit, is_outside

# Ended jobs are forgotten after a day; the clocks of two machines differ by less than an hour.
_PAUSE_EVERY = 200
_KEPT_MS = 23 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Audit:
    """The sums of the books, and everything that is wrong with them.

    Liabilities are owed to users and workers and include what is in transit. `wallet_lamports` and
    `in_flight_lamports` are None if the chain was not compared; what is in flight has left the wallet and is
    not booked as paid yet.
    """

    entries: int
    accounts: int
    liabilities_lamports: int
    revenue_lamports: int
    in_transit_lamports: int
    findings: tuple[str, ...]
    wallet_lamports: int | None = None
    in_flight_lamports: int | None = None

    @property
    def agrees(self) -> bool:
        """Whether journal, store and wallet agree."""
        return not self.findings


async def audit_books(
    live: BooksState,
    head: Head,
    seals: Seals,
    journal: RedisJournal,
    since: int = 0,
    wallet_lamports: int | None = None,
) -> Audit:
    """Rebuild the books up to `head` from the seals and the journal; compare them with `live` and the wallet.

    `since` is the last number of the seal whose state is believed; 0 believes none. No seal may be written
    meanwhile.
    """
    findings: list[str] = []
    state, before = BooksState(), BEGIN
    try:
        if since:
            seal = seals.read(since)
            state, before = seal.state, seal.through
            if seal.sha256 != live.seals.get(str(since)):
                raise LedgerError(f"the sealed entries up to {since} were changed")
        for number in sorted(int(through) for through in live.seals):
            if number > since:
                before = await _follow_seal(seals, number, state, before, live.seals[str(number)])
        async for line in journal.lines(before.number, head.number):
            follow(state, before, line)
            before = line.head
        if before != head:
            raise LedgerError(f"the journal leads to entry {before.number}, not to {head.number} as written")
        findings += _state_differences(live, state)
    except LedgerError as error:
        findings.append(error.message)
    inside = {account: n for account, n in live.balances.items() if not is_outside(account)}
    revenue = inside.pop(PLATFORM, 0)
    liabilities = sum(inside.values())
    in_transit = sum(lamports for account, lamports in inside.items() if is_in_transit(account))
    in_flight = None if wallet_lamports is None else liabilities + revenue - wallet_lamports
    return Audit(
        entries=head.number,
        accounts=len(live.balances),
        liabilities_lamports=liabilities,
        revenue_lamports=revenue,
        in_transit_lamports=in_transit,
        findings=(*findings, *_unsound(live), *_wallet_differences(in_flight, in_transit)),
        wallet_lamports=wallet_lamports,
        in_flight_lamports=in_flight,
    )


async def _follow_seal(seals: Seals, number: int, state: BooksState, before: Head, digest: str) -> Head:
    """Go through a file's entries, and compare its state with the one that they lead to."""
    seal = await asyncio.to_thread(seals.read, number)
    if seal.sha256 != digest or seal.after != before:
        raise LedgerError(f"the sealed entries up to {number} were changed")
    for line in seals.lines(number):
        follow(state, before, line)
        before = line.head
        if line.number % _PAUSE_EVERY == 0:
            await asyncio.sleep(0)
    if different := list(_state_differences(seal.state, state)):
        raise LedgerError(f"the state that was sealed at {number}: {different[0]}")
    return before


def _state_differences(stored: BooksState, replayed: BooksState) -> Iterator[str]:
    for table in fields(BooksState):
        yield from _unequal(table.name, getattr(stored, table.name), getattr(replayed, table.name))


def _unsound(state: BooksState) -> Iterator[str]:
    """Yield what no entry can lead to."""
    if total := sum(state.balances.values()):
        yield f"all accounts sum to {total} lamports, not to zero"
    for account, lamports in sorted(state.balances.items()):
        if not is_account(account):
            yield f"{account!r} is no account"
        # What left the wallet without a payout is the platform's debt.
        if account not in (PLATFORM, CHAIN) and lamports < state.locked.get(account, 0):
            yield f"{account} stands at {lamports} lamports, {state.locked.get(account, 0)} of them locked"


async def audit(
    stored: Snapshot,
    journal: AsyncIterator[Entry],
    wallet_lamports: int | None = None,
    *,
    now_ms: Callable[[], int] = wall_clock_ms,
) -> Audit:
    """Rebuild the books from the journal and compare balances, holds, ids, sums and the chain's wallet.

    Entries that were written after the snapshot are left out, and reservations that ended a day ago may be
    missing.
    """
    replay = _Replay()
    try:
        async for entry in journal:
            if entry.number > stored.length or not replay.take(entry):
                break
    except LedgerError as error:
        replay.findings.append(error.message)
    liabilities = sum(
        lamports
        for account, lamports in stored.balances.items()
        if not is_outside(account) and account != PLATFORM
    )
    revenue = stored.balances.get(PLATFORM, 0)
    in_transit = sum(n for account, n in stored.balances.items() if is_in_transit(account))
    in_flight = None if wallet_lamports is None else liabilities + revenue - wallet_lamports
    return Audit(
        entries=stored.length,
        accounts=len(stored.balances),
        liabilities_lamports=liabilities,
        revenue_lamports=revenue,
        in_transit_lamports=in_transit,
        findings=(
            *replay.findings,
            *(_differences(stored, replay, now_ms() - _KEPT_MS) if not replay.findings else ()),
            *_broken_invariants(stored.balances),
            *_wallet_differences(in_flight, in_transit),
        ),
        wallet_lamports=wallet_lamports,
        in_flight_lamports=in_flight,
    )


@dataclass(slots=True)
class _Replay:
    """The books as the journal alone gives them; the replay stops at the first entry that breaks a rule."""

    balances: dict[str, int] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    changed_ms: dict[str, int] = field(default_factory=dict)  # holds, when they last changed
    findings: list[str] = field(default_factory=list)

    def take(self, entry: Entry) -> bool:
        """Apply the next entry; return False, with a finding, if the rules would not have written it."""
        fault = self._fault(entry)
        if fault:
            self.findings.append(f"journal entry {entry.number}: {fault}")
        return not fault

    def _fault(self, entry: Entry) -> str | None:
        expected, id_ = len(self.numbers) + 1, entry.transfer.id
        if entry.number != expected:
            return f"comes where {expected} is missing"
        if id_ in self.numbers:
            return f"{id_} was entry {self.numbers[id_]} already"
        try:
            posting = post(entry.transfer, self.holds.get(hold_name(entry.transfer)))
            changed = booked(self.balances, posting)
        except AzuError as error:
            return error.message
        if posting.legs != entry.legs:
            return f"{id_} booked {_legs_text(entry)}, which is not what it says"
        self.balances.update(changed)
        self.numbers[id_] = entry.number
        if posting.after is not None:
            self.holds[posting.hold_name] = posting.after
            self.changed_ms[posting.hold_name] = entry.at_ms
        return None


def _differences(stored: Snapshot, replay: _Replay, kept_since_ms: int) -> Iterator[str]:
    if len(replay.numbers) != stored.length:
        yield f"the journal has {stored.length} entries, of which {len(replay.numbers)} can be read"
    yield from _unequal("account", stored.balances, replay.balances)
    forgotten = {
        name
        for name, hold in replay.holds.items()
        if name not in stored.holds
        and isinstance(hold, Reservation)
        and hold.ended_by is not None
        and replay.changed_ms[name] < kept_since_ms
    }
    kept = {name: hold for name, hold in replay.holds.items() if name not in forgotten}
    yield from _unequal("hold", stored.holds, kept)
    yield from _unequal("number of", stored.numbers, replay.numbers)
    due = {
        name: hold.expires_at_ms
        for name, hold in replay.holds.items()
        if isinstance(hold, Reservation) and hold.ended_by is None
    }
    yield from _unequal("expiry of", stored.expiries, due)


def _unequal(what: str, stored: Mapping[str, object], replayed: Mapping[str, object]) -> Iterator[str]:
    for name in sorted(stored.keys() | replayed.keys()):
        if stored.get(name) != replayed.get(name):
            yield f"{what} {name} is {stored.get(name)}; the journal makes it {replayed.get(name)}"


def _broken_invariants(balances: Mapping[str, int]) -> Iterator[str]:
    if total := sum(balances.values()):
        yield f"all accounts sum to {total} lamports, not to zero"
    for account, lamports in sorted(balances.items()):
        if not is_account(account):
            yield f"{account!r} is no account"
        if owner_sign(account) * lamports < 0:
            yield f"{account} stands at {lamports} lamports, on the wrong side of zero"


def _wallet_differences(in_flight: int | None, in_transit: int) -> Iterator[str]:
    if in_flight is not None and in_flight < 0:
        yield f"the wallet holds {-in_flight} lamports more than the books: a deposit that is not credited?"
    if in_flight is not None and in_flight > in_transit:
        yield f"the wallet lacks {in_flight} lamports; only {in_transit} are on their way out of it"


def _legs_text(entry: Entry) -> str:
    return ", ".join(f"{leg.lamports:+} on {leg.account}" for leg in entry.legs) or "nothing"
