"""What the books show the signer."""

from itertools import islice

from azu.auth.signatures import withdrawal_id
from azu.money.chain.rows import NONCE_WINDOW_MS
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import (
    PLATFORM,
    Deposit,
    PayoutPlanned,
    PlannedPayout,
    RevenueTaken,
    Suspended,
    WithdrawalPlanned,
)
from azu.money.signer.views import BooksHead, BooksView, Credit, OpenPayout, PayoutKind

# The most entries that are read for one view, and credits in it: it has to cross to the signer in one answer.
_ENTRIES = 10_000


async def view_of(
    ledger: Ledger, number: int, after: int, *, opened_at_ms: int, read_until_ms: int
) -> BooksView:
    """Return the books at this moment for a signer that last saw entry `number`.

    The credits are those after entry `after`; the next view goes on where they end.
    """
    hash_at = await ledger.hash_at(number)
    found = None if _has_all(ledger.state, after) else await _read(ledger, after)
    # Without a pause from here on: all of it is of one moment.
    state, head = ledger.state, ledger.head
    if found is None:
        rows = ((int(at), one) for at, one in state.credits.items() if int(at) > after)
        first = list(islice(rows, _ENTRIES))
        found = [one for _, one in first], first[-1][0] if len(first) == _ENTRIES else head.number
    credits_, until = found
    return BooksView(
        head=BooksHead(head.number, head.hash),
        hash_at=hash_at,
        owed_lamports=state.inside - state.balance(PLATFORM),
        revenue_lamports=state.balance(PLATFORM),
        credited_lamports=state.facts.get("credited", 0),
        read_until_ms=read_until_ms,
        opened_at_ms=opened_at_ms,
        payouts=open_payouts_of(state),
        credits=tuple(map(_credit, credits_)),
        credits_until=until,
    )


def payouts_numbered(state: BooksState, since: int) -> tuple[str, ...]:
    """Return the payouts that have a nonce from `since` on, also those that have ended."""
    return tuple(payout_id for nonce, payout_id in state.nonces.items() if int(nonce) >= since)


def open_payouts_of(state: BooksState) -> tuple[OpenPayout, ...]:
    """Return the payouts that money is set aside for, each with what its owner signed."""
    return tuple(_open(state, payout) for payout in state.payouts.values())


def withdrawals_since(state: BooksState, address: str, since_ms: int) -> int:
    """Return how many withdrawals of an address were set aside from a time on."""
    prefix, found = withdrawal_id(address, 0).removesuffix("0"), 0
    # Nonces follow the time, but for those of one window.
    for nonce, payout_id in reversed(state.nonces.items()):
        if int(nonce) < since_ms - NONCE_WINDOW_MS:
            break
        found += int(nonce) >= since_ms and payout_id.startswith(prefix)
    return found


def _has_all(state: BooksState, after: int) -> bool:
    """Whether the state still names every credit after an entry: it forgets those of long ago."""
    first = next(iter(state.credits), None)
    if first is not None and int(first) <= after:
        return True
    return sum(one.lamports for one in state.credits.values()) == state.facts.get("credited", 0)


async def _read(ledger: Ledger, after: int) -> tuple[list[Deposit | Suspended], int]:
    """Return the credits among the next entries, and the number of the last one that was read."""
    found: list[Deposit | Suspended] = []
    until = after
    async for entry in ledger.journal(after):
        until = entry.number
        if isinstance(entry.transfer, Deposit | Suspended):
            found.append(entry.transfer)
        if until - after >= _ENTRIES:
            break
    return found, until


def _credit(transfer: Deposit | Suspended) -> Credit:
    if isinstance(transfer, Deposit):
        row = transfer.id.removeprefix("deposit:")
        return Credit(row, transfer.address, transfer.lamports, transfer.at_ms)
    return Credit(transfer.row, transfer.sender, transfer.lamports, transfer.at_ms)


def _open(state: BooksState, payout: PlannedPayout) -> OpenPayout:
    proof, expires_at_ms = "", 0
    match payout:
        case PayoutPlanned():
            kind = PayoutKind.EARNINGS
            claim = state.claims.get(payout.address)
            proof = "" if claim is None else claim.signature
        case WithdrawalPlanned():
            kind, proof, expires_at_ms = PayoutKind.WITHDRAWAL, payout.signature, payout.expires_at_ms
        case RevenueTaken():
            kind, proof = PayoutKind.REVENUE, payout.command
    known = (payout.payout_id, kind, payout.address, payout.lamports, payout.nonce)
    return OpenPayout(*known, proof, expires_at_ms)
