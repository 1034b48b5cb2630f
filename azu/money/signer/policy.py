"""The signer's policy: what it signs, judged from the books, the chain and its own memory alone.

Pure: the clock is the chain's, and each function returns what the signer has to remember before it acts.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pydantic import ConfigDict

from azu.auth.signatures import TakeRevenue, Withdrawal, command_of, is_claim, is_signed
from azu.clock import DAY_MS
from azu.errors import Conflict, Forbidden, InvalidRequest, RateLimited, Unavailable
from azu.money.chain.rows import LATE_MS, NONCE_AHEAD_MS, NONCE_WINDOW_MS
from azu.money.signer.views import (
    BooksHead,
    BooksView,
    ChainView,
    Credit,
    IncomingRow,
    OpenPayout,
    OutgoingRow,
    PayoutKind,
    Room,
    TransferRequest,
)

_HOUR_MS = 3_600_000
# How long no other process may send from the platform's account before a signer goes on that was stopped.
QUARANTINE_MS = 600_000
# The chain admits a nonce from two days before to one day after its own time.
NONCE_LIFE_MS = 2 * DAY_MS
_NONCE_AGE_MS = 36 * _HOUR_MS
# A row is compared with what was signed for as long as its nonce is admitted; the rest is for late rows.
_REMEMBERED_MS = 2 * NONCE_LIFE_MS
# So many credits, and so many rows, are named in a finding; the others are counted.
_NAMED = 3
# After this many looks in a row with a finding the alarm is raised.
RED_AFTER = 3
_NONCE_KINDS = tuple(PayoutKind)
_NONCE_STEP = 4


@dataclass(frozen=True, slots=True)
class PayoutLimit:
    """The most that is sent in an hour and in a day, and the part of either that one address may get."""

    hour_lamports: int
    day_lamports: int
    address_percent: int

    def spans(self) -> tuple[tuple[int, int, str], ...]:
        """Return the spans in ms with their amounts and names."""
        return (_HOUR_MS, self.hour_lamports, "hour"), (DAY_MS, self.day_lamports, "day")

    @property
    def largest_lamports(self) -> int:
        """The largest amount that can ever be sent to one address at once."""
        return self.share_of(min(self.hour_lamports, self.day_lamports))

    def share_of(self, lamports: int) -> int:
        """Return the part of an amount that one address may get."""
        return lamports * self.address_percent // 100


@dataclass(frozen=True, slots=True)
class SigningRules:
    """What one signer signs by: its limits, the addresses of admins, and the platform's own.

    `platforms` are this platform's address and those that it had before; what was signed for one of them
    stays good.
    """

    limits: Mapping[PayoutKind, PayoutLimit]
    admins: frozenset[str]
    platforms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SignedTransfer:
    """What was signed under a nonce; nothing else is, ever. Once `is_void`, the transfer is not either.

    `burned_at_ms` is when the chain told this signer that the nonce is used up, 0 before.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    payout_id: str
    kind: PayoutKind
    address: str
    lamports: int
    is_void: bool = False
    burned_at_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SignerState:
    """What the signer remembers in a file of its own, and takes from no store.

    head: the last entry of the books that it has checked.
    credited_lamports: the sum of all credits up to there, each of which a row of the chain showed.
    matched_until_ms: every row before this time has its credit; `matched` are the rows after it that have.
    signed: what it signed by nonce, for as long as the chain might show it.
    since_ms: rows that left the account before this time were judged by an admin.
    opens_at_ms: nothing is signed before this time of the chain.
    halt: why nothing is signed until an admin's command; empty if it is.
    last_command: the nonce of the last command.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    head: BooksHead = field(default_factory=BooksHead)
    credited_lamports: int = 0
    matched_until_ms: int = 0
    matched: Mapping[str, int] = field(default_factory=dict)
    signed: Mapping[int, SignedTransfer] = field(default_factory=dict)
    since_ms: int = 0
    opens_at_ms: int = 0
    halt: str = ""
    last_command: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at books and chain found: why nothing may be signed now, empty if all agrees."""

    state: SignerState
    findings: tuple[str, ...]


def nonce_for(kind: PayoutKind, name: str, chain_ms: int, place: int = 0) -> int:
    """Return a nonce of a kind at the chain's time; each `place` gives another one.

    It follows from the payout's name and a window of time, so that two copies of a network that set the same
    payout aside in one window have one nonce, which the chain takes once. Nonces have to follow the time:
    the chain takes none below the hundred highest.
    """
    digest = hashlib.sha256(f"{kind}:{name}:{place}".encode()).digest()
    within = int.from_bytes(digest) % (NONCE_WINDOW_MS // _NONCE_STEP)
    start_ms = chain_ms - chain_ms % NONCE_WINDOW_MS
    return start_ms + _NONCE_STEP * within + _NONCE_KINDS.index(kind)


def kind_of(nonce: int | None) -> PayoutKind | None:
    """Return the kind of the payout that may have used a nonce; None if no payout may have."""
    number = _NONCE_STEP if nonce is None else nonce % _NONCE_STEP
    return _NONCE_KINDS[number] if number < len(_NONCE_KINDS) else None


def first_state(books: BooksView, chain: ChainView) -> SignerState:
    """Return the state of a signer without a memory.

    It signs at once for a new network alone: another signer of the same key may know what this one does not.
    """
    if chain.outgoing:
        return SignerState(halt="this signer remembers nothing, and the platform's account has sent before")
    if 0 < books.opened_at_ms < chain.now_ms - QUARANTINE_MS:
        return SignerState(halt="this signer remembers nothing, and the books are not new")
    return SignerState()


def unexplained(
    state: SignerState, books: BooksView, chain: ChainView
) -> tuple[tuple[Credit, ...], tuple[IncomingRow, ...]]:
    """Return the new credits that no row shows, and the settled rows that nothing was credited for.

    The caller looks for the former in their senders' ledgers, and for the actions of the latter.
    """
    rows = _Rows(state, chain.incoming)
    credits_ = tuple(credit for credit in books.credits if not rows.take(credit))
    return credits_, rows.uncredited(_settled_ms(books, chain))


def look(
    state: SignerState,
    books: BooksView,
    chain: ChainView,
    *,
    shown: Collection[str] = (),
    excused: Collection[str] = (),
) -> Look:
    """Compare books, chain and memory.

    `shown` are the rows of credits that other ledgers of the chain show, `excused` rows that are not HYPE or
    that no action proves. Where the books do not agree, the memory stays where it was.
    """
    state = _without_old(state, chain.now_ms)
    state = _compare_outgoing(state, chain)
    if not state.halt and (fault := _head_fault(state, books)):
        state = replace(state, halt=fault)
    findings = [state.halt] if state.halt else []
    if short := shortfall(books, chain):
        findings.append(f"the platform's account lacks {short} lamports of what the books owe")
    state, faults = _compare_incoming(state, books, chain, shown, excused)
    findings += faults
    if not state.halt and chain.now_ms < state.opens_at_ms:
        opens = datetime.fromtimestamp(state.opens_at_ms / 1000, UTC)
        findings.append(f"nothing is signed before {opens:%Y-%m-%d %H:%M:%S} (UTC)")
    return Look(state, tuple(findings))


def shortfall(books: BooksView, chain: ChainView) -> int:
    """Return how many lamports the account lacks.

    An open payout whose own nonce the rows show has left the account and is still in the books. What the
    platform owes to itself covers nothing: revenue below zero counts as none.
    """
    left = {(row.nonce, row.address, row.lamports) for row in chain.outgoing}
    sent = sum(one.lamports for one in books.payouts if (one.nonce, one.address, one.lamports) in left)
    return max(0, books.owed_lamports + max(0, books.revenue_lamports) - chain.balance_lamports - sent)


def admit(
    state: SignerState, books: BooksView, chain: ChainView, asked: TransferRequest, rules: SigningRules
) -> SignerState:
    """Return what to remember before a transfer is signed; the last look has found nothing.

    Raises Conflict for a nonce or payout that was signed otherwise, Forbidden for what the books or the
    recipient's signature do not say, InvalidRequest for a nonce out of range, RateLimited beyond a limit,
    Unavailable while an earlier transfer to the address is undecided.
    """
    wanted = SignedTransfer(asked.payout_id, asked.kind, asked.address, asked.lamports)
    if (known := state.signed.get(asked.nonce)) is not None:
        if known != wanted:
            raise Conflict(f"nonce {asked.nonce} was signed for {known}", param="nonce")
        return state
    others = (nonce for nonce, one in state.signed.items() if one.payout_id == asked.payout_id)
    if (other := next(others, None)) is not None:
        raise Conflict(f"{asked.payout_id} was signed under nonce {other}", param="payout_id")
    age_ms = chain.now_ms - asked.nonce
    if not -NONCE_AHEAD_MS <= age_ms <= _NONCE_AGE_MS or kind_of(asked.nonce) is not asked.kind:
        raise InvalidRequest(f"nonce {asked.nonce} is none for {asked.kind} now", param="nonce")
    payout = next((one for one in books.payouts if one.payout_id == asked.payout_id), None)
    if payout is None or _request(payout) != asked:
        raise Forbidden(f"the books have {payout}, not {asked}", param="payout_id")
    if fault := _proof_fault(payout, rules):
        raise Forbidden(f"{asked.payout_id}: {fault}", param="payout_id")
    if any(one.address == asked.address for one in undecided(state, books, chain).values()):
        raise Unavailable(f"an earlier transfer to {asked.address} is undecided", code="undecided_transfer")
    if (limit := rules.limits.get(asked.kind)) is not None:
        _check_limit(state, chain, asked, limit)
    return replace(state, signed={**state.signed, asked.nonce: wanted})


def room(state: SignerState, chain: ChainView, kind: PayoutKind, limit: PayoutLimit) -> Room:
    """Return what a limit leaves now."""
    spans = [(most, _sent(state, chain, kind, span_ms)) for span_ms, most, _ in limit.spans()]
    used = spans[-1][1]
    return Room(
        all_lamports=max(0, min(most - sent.total() for most, sent in spans)),
        each_lamports=limit.largest_lamports,
        left_lamports={one: min(limit.share_of(most) - sent[one] for most, sent in spans) for one in used},
        used_lamports=dict(used),
    )


def day_part(state: SignerState, chain: ChainView, kind: PayoutKind, limit: PayoutLimit) -> float:
    """Return the part of a kind's daily limit that was sent within a day."""
    return _sent(state, chain, kind, DAY_MS).total() / limit.day_lamports


def void(state: SignerState, books: BooksView, nonce: int) -> SignerState:
    """Return what to remember before a nonce is used up: no transfer is signed under it any more.

    Raises Forbidden for a nonce that belongs to no payout.
    """
    known = state.signed.get(nonce)
    if known is None:
        payout = next((one for one in books.payouts if one.nonce == nonce), None)
        if payout is None:
            raise Forbidden(f"no payout has nonce {nonce}", param="nonce")
        known = SignedTransfer(payout.payout_id, payout.kind, payout.address, payout.lamports)
    return replace(state, signed={**state.signed, nonce: replace(known, is_void=True)})


def undecided(state: SignerState, books: BooksView, chain: ChainView) -> Mapping[int, SignedTransfer]:
    """Return, by nonce, what was signed, may still be executed or shown, and is in the books no more.

    Books that went back know nothing of it, and might pay it a second time. The signer uses up these nonces.
    """
    known = {payout.nonce for payout in books.payouts}
    return {nonce: one for nonce, one in waiting(state, chain).items() if nonce not in known}


def unseen(state: SignerState, books: BooksView, chain: ChainView) -> Mapping[int, SignedTransfer]:
    """Return, by nonce, what was signed and has no row, and may have left the account nevertheless.

    The caller looks for it in the ledgers of its recipients.
    """
    return waiting(state, chain) if shortfall(books, chain) else undecided(state, books, chain)


def burned(state: SignerState, nonce: int, now_ms: int) -> SignerState:
    """Return the state after the chain has said that a nonce is used up."""
    one = replace(state.signed[nonce], is_void=True, burned_at_ms=now_ms)
    return replace(state, signed={**state.signed, nonce: one})


def accept(state: SignerState, books: BooksView, head: BooksHead, nonce: int, now_ms: int) -> SignerState:
    """Return the state after an admin's command to go on with the books that have the entry `head`.

    `books` were asked for that entry. Everything is compared again from the first entry and row on. Raises
    Conflict for a command that was used, or for an entry that the books do not have.
    """
    if nonce <= state.last_command:
        raise Conflict("this command was used before, or a later one was", param="nonce")
    if books.head.number < head.number or books.hash_at != head.hash:
        raise Conflict(f"the books do not have entry {head.number} as the command names it", param="head")
    return SignerState(
        signed=state.signed, since_ms=now_ms, opens_at_ms=now_ms + QUARANTINE_MS, last_command=nonce
    )


def retired(state: SignerState, now_ms: int) -> SignerState:
    """Return the state once no key can execute any more what was signed: its nonces are used up."""
    signed = {
        nonce: replace(one, is_void=True, burned_at_ms=one.burned_at_ms or now_ms)
        for nonce, one in state.signed.items()
    }
    return replace(state, signed=signed)


def _without_old(state: SignerState, now_ms: int) -> SignerState:
    since_ms = now_ms - _REMEMBERED_MS
    return replace(state, signed={nonce: one for nonce, one in state.signed.items() if nonce > since_ms})


def waiting(state: SignerState, chain: ChainView) -> dict[int, SignedTransfer]:
    """Return what was signed, is not shown, and may still come: by nonce."""
    seen = {row.nonce for row in _outgoing(state, chain)}
    return {
        nonce: one
        for nonce, one in state.signed.items()
        if nonce not in seen
        and nonce > chain.now_ms - NONCE_LIFE_MS - LATE_MS
        and not 0 < one.burned_at_ms < chain.now_ms - LATE_MS
    }


def _compare_outgoing(state: SignerState, chain: ChainView) -> SignerState:
    """Find rows that this signer did not sign: they end its signing, or make it wait longer."""
    since_ms = max(state.since_ms, chain.now_ms - NONCE_LIFE_MS)
    rows = _outgoing(state, chain)
    foreign = [row for row in rows if row.at_ms > since_ms and not _is_own(state, row)]
    if not foreign or state.halt:
        return state
    if chain.now_ms < state.opens_at_ms:
        latest_ms = max(row.at_ms for row in foreign)
        return replace(state, since_ms=latest_ms, opens_at_ms=chain.now_ms + QUARANTINE_MS)
    named = ", ".join(f"{row.lamports} lamports to {row.address}" for row in foreign)
    return replace(state, halt=f"another process sent {named} from the platform's account")


def _outgoing(state: SignerState, chain: ChainView) -> list[OutgoingRow]:
    """Return what left the account, but what others sent with a key that was replaced.

    They may have that key for ever. What they take, the balance and the books show.
    """
    return [row for row in chain.outgoing if not row.is_former or _is_own(state, row)]


def _is_own(state: SignerState, row: OutgoingRow) -> bool:
    signed = None if row.nonce is None else state.signed.get(row.nonce)
    return signed is not None and (signed.address, signed.lamports) == (row.address, row.lamports)


def _head_fault(state: SignerState, books: BooksView) -> str:
    known = state.head
    if books.head.number < known.number:
        return f"the books went back by {known.number - books.head.number} entries"
    if books.hash_at != known.hash:
        return f"the books have another entry {known.number} than before"
    return ""


def _settled_ms(books: BooksView, chain: ChainView) -> int:
    return min(books.read_until_ms, chain.now_ms - LATE_MS)


class _Rows:
    """Incoming rows, each of which one credit takes."""

    def __init__(self, state: SignerState, rows: Iterable[IncomingRow]) -> None:
        self.matched = dict(state.matched)
        self._free = {
            row.row: row
            for row in rows
            if row.at_ms >= state.matched_until_ms and row.row not in self.matched
        }
        self._of_hash: dict[str, list[str]] = {}
        for row in self._free.values():
            self._of_hash.setdefault(row.hash, []).append(row.row)

    def take(self, credit: Credit) -> bool:
        """Whether a row shows a credit; no other credit may have that row."""
        for name in (credit.row, *self._of_hash.get(credit.row, ())):
            row = self._free.get(name)
            if row is not None and (row.sender, row.lamports) == (credit.sender, credit.lamports):
                self.matched[name] = self._free.pop(name).at_ms
                return True
        return False

    def uncredited(self, until_ms: int) -> tuple[IncomingRow, ...]:
        """Return the rows before a time that no credit has taken."""
        return tuple(row for row in self._free.values() if row.at_ms < until_ms)


def _compare_incoming(
    state: SignerState,
    books: BooksView,
    chain: ChainView,
    shown: Collection[str],
    excused: Collection[str],
) -> tuple[SignerState, list[str]]:
    rows, total = _Rows(state, chain.incoming), state.credited_lamports
    unshown = []
    for credit in books.credits:
        total += credit.lamports
        if not rows.take(credit) and credit.row not in shown:
            unshown.append(
                f"no row of the chain shows {credit.row}, credited with {credit.lamports} lamports"
            )
    faults = _first(unshown)
    if total != books.credited_lamports:
        faults.append(f"the books' credits sum to {books.credited_lamports} lamports, the chain's to {total}")
    until_ms = max(state.matched_until_ms, _settled_ms(books, chain))
    faults += _first(
        [
            f"nothing was credited for {row.row}, {row.lamports} lamports"
            for row in rows.uncredited(until_ms)
            if row.row not in excused
        ]
    )
    if faults or state.halt:
        return state, faults
    kept = {row: at_ms for row, at_ms in rows.matched.items() if at_ms >= until_ms}
    state = replace(state, head=books.head, credited_lamports=total, matched_until_ms=until_ms, matched=kept)
    return state, faults


def _first(faults: list[str]) -> list[str]:
    """Return a few of many faults, and how many more there are."""
    more = len(faults) - _NAMED
    return faults[:_NAMED] + ([f"and {more} more of this kind"] if more > 0 else [])


def _request(payout: OpenPayout) -> TransferRequest:
    return TransferRequest(payout.payout_id, payout.kind, payout.address, payout.lamports, payout.nonce)


def _proof_fault(payout: OpenPayout, rules: SigningRules) -> str | None:
    """Return what the recipient, or an admin, did not sign."""
    match payout.kind:
        case PayoutKind.EARNINGS:
            claimed = any(is_claim(payout.address, platform, payout.proof) for platform in rules.platforms)
            return None if claimed else "its address has not claimed what it earns"
        case PayoutKind.WITHDRAWAL:
            return None if _is_withdrawal(payout, rules.platforms) else "its address has not signed it"
        case PayoutKind.REVENUE:
            command = command_of(payout.proof, rules.platforms, rules.admins)
            wanted = (payout.payout_id, payout.address, payout.lamports)
            if (
                isinstance(command, TakeRevenue)
                and (command.payout_id, command.address, command.lamports) == wanted
            ):
                is_late = _begun_ms(payout) > command.expires_at_ms
                return "the admin's command has expired" if is_late else None
            return "no admin has signed it"


def _begun_ms(payout: OpenPayout) -> int:
    """Return when the window began in which a payout got its nonce."""
    return payout.nonce - payout.nonce % NONCE_WINDOW_MS


def _is_withdrawal(payout: OpenPayout, platforms: Iterable[str]) -> bool:
    prefix, _, number = payout.payout_id.rpartition("withdrawal-")
    if not prefix or not number.isdecimal() or _begun_ms(payout) > payout.expires_at_ms:
        return False
    asked = Withdrawal(
        address=payout.address,
        lamports=payout.lamports,
        nonce=int(number),
        expires_at_ms=payout.expires_at_ms,
    )
    return asked.payout_id == payout.payout_id and any(
        is_signed(asked, platform, payout.proof) for platform in platforms
    )


def _check_limit(state: SignerState, chain: ChainView, asked: TransferRequest, limit: PayoutLimit) -> None:
    """Raise RateLimited if a transfer exceeds a limit."""
    for span_ms, most, name in limit.spans():
        sent = _sent(state, chain, asked.kind, span_ms)
        if asked.lamports + sent.total() > most:
            raise RateLimited(f"{asked.kind} may take {most} lamports in a {name}", code="payout_limit")
        if asked.lamports + sent[asked.address] > limit.share_of(most):
            percent = limit.address_percent
            raise RateLimited(f"one address may get {percent}% of {most} in a {name}", code="payout_limit")


def _sent(state: SignerState, chain: ChainView, kind: PayoutKind, span_ms: int) -> Counter[str]:
    """Return the lamports that each address got within a time; what is signed and not shown counts too."""
    sent = Counter[str]()
    for row in _outgoing(state, chain):
        if kind_of(row.nonce) in (kind, None) and row.at_ms > chain.now_ms - span_ms:
            sent[row.address] += row.lamports
    for one in waiting(state, chain).values():
        if one.kind is kind:
            sent[one.address] += one.lamports
    return sent
