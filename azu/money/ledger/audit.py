"""The proof that the books are right: the rules replay every entry, and the result is compared."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from azu.errors import JournalFault
from azu.money.ledger.journal import BEGIN, Head, RedisJournal, changed, follow
from azu.money.ledger.seals import Seals
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import CHAIN, PLATFORM, is_account, is_in_transit, is_outside

_PAUSE_EVERY = 200


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
                raise changed(f"the sealed entries up to {since} were changed")
        for number in sorted(int(through) for through in live.seals):
            if number > since:
                before = await _follow_seal(seals, number, state, before, live.seals[str(number)])
        async for line in journal.lines(before.number, head.number):
            follow(state, before, line)
            before = line.head
        if before != head:
            raise changed(f"the journal leads to entry {before.number}, not to {head.number} as written")
        findings += _state_differences(live, state)
    except JournalFault as error:
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
        raise changed(f"the sealed entries up to {number} were changed")
    for line in seals.lines(number):
        follow(state, before, line)
        before = line.head
        if line.number % _PAUSE_EVERY == 0:
            await asyncio.sleep(0)
    if different := list(_state_differences(seal.state, state)):
        raise changed(f"the state that was sealed at {number}: {different[0]}")
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


def _unequal(what: str, stored: Mapping[str, object], replayed: Mapping[str, object]) -> Iterator[str]:
    for name in sorted(stored.keys() | replayed.keys()):
        if stored.get(name) != replayed.get(name):
            yield f"{what} {name} is {stored.get(name)}; the journal makes it {replayed.get(name)}"


def _wallet_differences(in_flight: int | None, in_transit: int) -> Iterator[str]:
    if in_flight is not None and in_flight < 0:
        yield f"the wallet holds {-in_flight} lamports more than the books: a deposit that is not credited?"
    if in_flight is not None and in_flight > in_transit:
        yield f"the wallet lacks {in_flight} lamports; only {in_transit} are on their way out of it"
