"""The ledger's rules: what each transfer does to the books, and what may never happen.

Pure: a transfer, and the time that stands in its entry, are worked out over a draft of the books. A transfer
that is refused leaves the draft as it was.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from azu.errors import AzuError, Conflict, InsufficientBalance, LedgerError, Unauthenticated
from azu.money.chain.rows import NONCE_WINDOW_MS
from azu.money.ledger.entry import Leg
from azu.money.ledger.state import BooksState, Draft, Unmatured, add, longest_hold
from azu.money.ledger.transfers import (
    CHAIN,
    HELD,
    PLATFORM,
    PLATFORM_PAYING,
    SUSPENSE,
    Account,
    Deposit,
    Disputed,
    DisputeDismissed,
    EarningsClaimed,
    Expire,
    HeldPaid,
    HeldReleased,
    JournalSealed,
    KeyOpened,
    KeyRevoked,
    LossAccepted,
    LossCovered,
    LossNoted,
    NodeEnrolled,
    NodeRemoved,
    PayoutPaid,
    PayoutPlanned,
    PayoutRefused,
    PlannedPayout,
    PlatformReplaced,
    Release,
    Reserve,
    RevenueTaken,
    Reversed,
    Settle,
    Suspended,
    SuspenseCredited,
    Transfer,
    UnknownOut,
    WithdrawalPlanned,
    WriterOpened,
    node_held,
    user_available,
    user_reserved,
    user_withdrawing,
    worker_earned,
    worker_paid,
    worker_paying,
)
from azu.units import hype_from_lamports

# The largest balance that an account may have.
MAX_BALANCE = 2**63 - 1

Changes = Mapping[Account, int]


def apply_once(state: BooksState, transfer: Transfer, at_ms: int) -> tuple[Leg, ...]:
    """Apply a transfer to a state; raises as `post` does, and then only time has passed."""
    draft = Draft(state, at_ms)
    legs = post(draft, transfer)
    draft.keep()
    return legs


def post(draft: Draft, transfer: Transfer) -> tuple[Leg, ...]:
    """Write what a transfer does into the draft; return the accounts' changes, which sum to zero.

    The caller sees to it that no id is used twice. Raises InsufficientBalance if a user's account or a key's
    limit does not cover the transfer, Unauthenticated for a key that expired, Conflict for a loss of another
    size, LedgerError for every other transfer that the rules do not allow: code `unknown_hold` for a job or
    payout that is not open, `hold_exists` for one that is, `not_matured` for money that may be reversed.
    """
    legs = _RULES[type(transfer)](draft, transfer)
    add(draft.facts, "number", 1)
    return legs


def owner_sign(account: str) -> int:
    """Return 1 for accounts that may not be below zero, -1 for the chain's, which may not be above zero."""
    return -1 if account == CHAIN else 1


def _book(
    draft: Draft, transfer: Transfer, changes: Changes, *, may_owe: tuple[Account, ...] = ()
) -> tuple[Leg, ...]:
    """Write the changes of balances; raises, with nothing written, if one would be out of range.

    The accounts of `may_owe` may come to stand on the wrong side of zero.
    """
    legs = tuple(Leg(account, lamports) for account, lamports in changes.items() if lamports)
    assert sum(leg.lamports for leg in legs) == 0
    for leg in legs:
        balance = draft.balances.get(leg.account) or 0
        after = owner_sign(leg.account) * (balance + leg.lamports)
        # An account that owes already may still get closer to zero.
        is_worse = owner_sign(leg.account) * leg.lamports < 0 and leg.account not in may_owe
        if (after < 0 and is_worse) or abs(after) > MAX_BALANCE:
            raise _refusal(transfer, leg, balance)
    for leg in legs:
        add(draft.balances, leg.account, leg.lamports)
    return legs


def _refusal(transfer: Transfer, leg: Leg, balance: int) -> AzuError:
    if isinstance(transfer, Reserve | WithdrawalPlanned | LossCovered) and leg.lamports < 0:
        holds, takes = hype_from_lamports(balance), hype_from_lamports(-leg.lamports)
        return InsufficientBalance(f"the account holds {holds} HYPE; this may take {takes}")
    return LedgerError(f"{leg.account} at {balance} lamports does not allow {leg.lamports} by {transfer.id}")


def _deposit(draft: Draft, transfer: Deposit) -> tuple[Leg, ...]:
    arrived = {CHAIN: -transfer.lamports, user_available(transfer.address): transfer.lamports}
    legs = _book(draft, transfer, arrived)
    _note_credit(draft, transfer)
    return legs


def _suspend(draft: Draft, transfer: Suspended) -> tuple[Leg, ...]:
    _check_id(transfer, f"suspended:{transfer.row}")
    legs = _book(draft, transfer, {CHAIN: -transfer.lamports, SUSPENSE: transfer.lamports})
    draft.suspense.put(transfer.row, transfer)
    _note_credit(draft, transfer)
    return legs


def _note_credit(draft: Draft, transfer: Deposit | Suspended) -> None:
    draft.credits.put(str(draft.fact("number") + 1), transfer)
    add(draft.facts, "credited", transfer.lamports)
    draft.note_most("row_ms", transfer.at_ms)


def _credit_suspense(draft: Draft, transfer: SuspenseCredited) -> tuple[Leg, ...]:
    waiting = draft.suspense.get(transfer.row)
    if waiting is None or waiting.lamports != transfer.lamports:
        raise LedgerError(f"{transfer.id}: no row {transfer.row} of {transfer.lamports} lamports waits")
    owner = user_available(transfer.address)
    legs = _book(draft, transfer, {SUSPENSE: -transfer.lamports, owner: transfer.lamports})
    draft.suspense.put(transfer.row, None)
    return legs


def _unknown_out(draft: Draft, transfer: UnknownOut) -> tuple[Leg, ...]:
    available, earned = user_available(transfer.address), worker_earned(transfer.address)
    of_user = min(transfer.lamports, draft.balances.get(available) or 0)
    of_worker = min(transfer.lamports - of_user, draft.free(earned))
    owed = transfer.lamports - of_user - of_worker
    taken = {available: -of_user, earned: -of_worker, PLATFORM: -owed, CHAIN: transfer.lamports}
    # The money has left, whatever the books had of it: what the address did not have the platform owes.
    legs = _book(draft, transfer, taken, may_owe=(PLATFORM, CHAIN))
    add(draft.facts, "revenue_left", owed)
    return legs


def _reserve(draft: Draft, transfer: Reserve) -> tuple[Leg, ...]:
    _check_id(transfer, f"reserve:{transfer.job_id}")
    if draft.reservations.get(transfer.job_id) is not None:
        raise LedgerError(f"{transfer.id}: the job was reserved for before", code="hold_exists")
    key = draft.keys.get(transfer.key_id)
    if key is None or key.address != transfer.address:
        raise LedgerError(
            f"{transfer.id}: {transfer.address} has no key {transfer.key_id}", code="unknown_key"
        )
    if key.expires_at_ms is not None and key.expires_at_ms <= draft.at_ms:
        raise Unauthenticated("this API key has expired; `azu login` opens another")
    spent, limit = draft.spent.get(key.key_id) or 0, key.spend_limit_lamports
    if limit is not None and spent + transfer.lamports > limit:
        takes, left = hype_from_lamports(transfer.lamports), hype_from_lamports(limit - spent)
        raise InsufficientBalance(
            f"this may take {takes} HYPE; {left} are left of the key's limit", code="spend_limit_reached"
        )
    taken = {
        user_available(transfer.address): -transfer.lamports,
        user_reserved(transfer.address): transfer.lamports,
    }
    legs = _book(draft, transfer, taken)
    draft.reservations.put(transfer.job_id, transfer)
    draft.note_most(longest_hold(transfer.job_id), transfer.expires_at_ms - draft.at_ms)
    add(draft.spent, key.key_id, transfer.lamports)
    draft.count_today(key.key_id, transfer.lamports)
    draft.count_today(transfer.job_id, transfer.lamports)
    return legs


def _settle(draft: Draft, transfer: Settle) -> tuple[Leg, ...]:
    hold, charged = _reservation(draft, transfer), transfer.charged_lamports
    most = min(hold.lamports, hold.price_of(transfer.prompt_tokens + transfer.completion_tokens))
    if charged > most:
        raise LedgerError(f"{transfer.id} charges {charged} lamports where {most} are the most")
    paid = {
        PLATFORM: transfer.platform_lamports,
        **{worker_earned(payout): lamports for payout, lamports in transfer.shares.items()},
        **{node_held(node_id): lamports for node_id, lamports in transfer.held.items()},
    }
    legs = _end_reservation(draft, transfer, hold, paid)
    if transfer.maturity_ms and charged:
        kept = {str(account): lamports for account, lamports in paid.items() if lamports}
        draft.lock(transfer.job_id, Unmatured(hold.address, draft.at_ms + transfer.maturity_ms, kept))
        draft.note_most("maturity_ms", transfer.maturity_ms)
    return legs


def _release(draft: Draft, transfer: Release | Expire) -> tuple[Leg, ...]:
    return _end_reservation(draft, transfer, _reservation(draft, transfer), {})


def _reservation(draft: Draft, transfer: Settle | Release | Expire) -> Reserve:
    _check_id(transfer, f"{transfer.kind}:{transfer.job_id}")
    hold = draft.reservations.get(transfer.job_id)
    if hold is None:
        raise LedgerError(f"{transfer.id}: nothing is reserved for the job", code="unknown_hold")
    return hold


def _end_reservation(draft: Draft, transfer: Transfer, hold: Reserve, paid: Changes) -> tuple[Leg, ...]:
    rest = hold.lamports - sum(paid.values())
    changes = {user_reserved(hold.address): -hold.lamports, **paid, user_available(hold.address): rest}
    legs = _book(draft, transfer, changes)
    draft.reservations.put(hold.job_id, None)
    if draft.keys.get(hold.key_id) is not None:
        add(draft.spent, hold.key_id, -rest)
    if draft.was_today(hold.job_id):
        draft.count_today(hold.key_id, -rest)
    draft.count_today(hold.address, sum(paid.values()))
    return legs


def _dispute(draft: Draft, transfer: Disputed | DisputeDismissed | Reversed) -> tuple[Leg, ...]:
    job_id = transfer.job_id
    held, open_ = draft.disputes.get(job_id), draft.unmatured.get(job_id)
    if held is not None and not isinstance(transfer, Disputed):
        is_reversal = isinstance(transfer, Reversed)
        to = {user_available(held.payer): held.lamports} if is_reversal else _accounts(held)
        legs = _book(draft, transfer, {HELD: -held.lamports, **to})
        draft.disputes.put(job_id, None)
        return legs
    if open_ is None or isinstance(transfer, DisputeDismissed):
        raise LedgerError(
            f"{transfer.id}: what {job_id} paid out has matured, or it paid out nothing", code="matured"
        )
    taken = {account: -lamports for account, lamports in _accounts(open_).items()}
    to = {HELD if isinstance(transfer, Disputed) else user_available(open_.payer): open_.lamports}
    # The platform may have lost its part since; the payer gets it nevertheless.
    legs = _book(draft, transfer, {**taken, **to}, may_owe=(PLATFORM,))
    draft.unlock(job_id, open_)
    if isinstance(transfer, Disputed):
        draft.disputes.put(job_id, open_)
    return legs


def _accounts(paid: Unmatured) -> dict[Account, int]:
    return {Account(account): lamports for account, lamports in paid.accounts.items()}


def _held(draft: Draft, transfer: HeldPaid | HeldReleased) -> tuple[Leg, ...]:
    account, node = node_held(transfer.node_id), draft.nodes.get(transfer.node_id)
    _check_free(draft, transfer, account)
    if isinstance(transfer, HeldReleased):
        to = user_available(transfer.address)
    elif transfer.command or (node is not None and node.payout == transfer.address):
        to = worker_earned(transfer.address)
    else:
        raise LedgerError(f"{transfer.id}: {transfer.node_id} is not enrolled for {transfer.address}")
    return _book(draft, transfer, {account: -transfer.lamports, to: transfer.lamports})


def source_of(payout: PlannedPayout) -> Account:
    """Return the account that a payout's money came from, and goes back to if the chain refuses."""
    match payout:
        case PayoutPlanned():
            return worker_earned(payout.address)
        case WithdrawalPlanned():
            return user_available(payout.address)
        case RevenueTaken():
            return PLATFORM


def transit_of(payout: PlannedPayout) -> Account:
    """Return the account that has the money while the payout is on its way."""
    match payout:
        case PayoutPlanned():
            return worker_paying(payout.address)
        case WithdrawalPlanned():
            return user_withdrawing(payout.address)
        case RevenueTaken():
            return PLATFORM_PAYING


def _plan(draft: Draft, transfer: PlannedPayout) -> tuple[Leg, ...]:
    _check_id(transfer, f"{transfer.payout_id}:planned")
    source = source_of(transfer)
    if isinstance(transfer, PayoutPlanned) and draft.claims.get(transfer.address) is None:
        raise LedgerError(f"{transfer.id}: {transfer.address} has not claimed its earnings", code="unclaimed")
    if not isinstance(transfer, WithdrawalPlanned):
        _check_free(draft, transfer, source)
    # One of an earlier window may have been forgotten, and may be below those that the chain takes.
    is_early = transfer.nonce <= draft.fact("nonce") - NONCE_WINDOW_MS
    if is_early or draft.nonces.get(str(transfer.nonce)) is not None:
        raise LedgerError(f"{transfer.id}: nonce {transfer.nonce} may have been used", code="nonce_used")
    legs = _book(draft, transfer, {source: -transfer.lamports, transit_of(transfer): transfer.lamports})
    draft.payouts.put(transfer.payout_id, transfer)
    draft.nonces.put(str(transfer.nonce), transfer.payout_id)
    draft.note_most("nonce", transfer.nonce)
    return legs


def _end_payout(draft: Draft, transfer: PayoutPaid | PayoutRefused) -> tuple[Leg, ...]:
    payout = draft.payouts.get(transfer.payout_id)
    if payout is None:
        raise LedgerError(f"{transfer.id}: no payout {transfer.payout_id} is open", code="unknown_hold")
    if isinstance(transfer, PayoutRefused):
        _check_id(transfer, f"{transfer.payout_id}:refused")
        to = {source_of(payout): payout.lamports}
    else:
        _check_id(transfer, f"{transfer.payout_id}:paid")
        if transfer.fee_lamports > payout.lamports:
            raise LedgerError(
                f"{transfer.id}: a fee of {transfer.fee_lamports} on {payout.lamports} lamports"
            )
        arrived = payout.lamports - transfer.fee_lamports if isinstance(payout, PayoutPlanned) else 0
        to = {worker_paid(payout.address): arrived, CHAIN: payout.lamports - arrived}
    legs = _book(draft, transfer, {transit_of(payout): -payout.lamports, **to})
    if isinstance(payout, RevenueTaken) and isinstance(transfer, PayoutPaid):
        add(draft.facts, "revenue_left", payout.lamports)
    draft.payouts.put(payout.payout_id, None)
    return legs


def _open_key(draft: Draft, transfer: KeyOpened) -> tuple[Leg, ...]:
    if draft.keys.get(transfer.key_id) is not None:
        raise LedgerError(f"{transfer.id}: there is a key {transfer.key_id}", code="key_exists")
    # The journal keeps what was signed.
    draft.keys.put(transfer.key_id, replace(transfer, text="", signature=""))
    return ()


def _revoke_key(draft: Draft, transfer: KeyRevoked) -> tuple[Leg, ...]:
    if draft.keys.get(transfer.key_id) is None:
        raise LedgerError(f"{transfer.id}: there is no key {transfer.key_id}", code="unknown_key")
    draft.keys.put(transfer.key_id, None)
    draft.spent.put(transfer.key_id, None)
    return ()


def _enrol(draft: Draft, transfer: NodeEnrolled) -> tuple[Leg, ...]:
    known = draft.nodes.get(transfer.node_id)
    if known is not None and known.key_digest != transfer.key_digest:
        raise LedgerError(f"{transfer.id}: the node is enrolled with another key", code="node_taken")
    if draft.removed.get(transfer.node_id) is not None:
        raise LedgerError(f"{transfer.id}: an admin removed the node", code="node_removed")
    draft.nodes.put(transfer.node_id, transfer)
    return ()


def _remove_node(draft: Draft, transfer: NodeRemoved) -> tuple[Leg, ...]:
    if draft.nodes.get(transfer.node_id) is None:
        raise LedgerError(f"{transfer.id}: there is no node {transfer.node_id}", code="unknown_node")
    draft.nodes.put(transfer.node_id, None)
    draft.removed.put(transfer.node_id, transfer)
    return ()


def _claim(draft: Draft, transfer: EarningsClaimed) -> tuple[Leg, ...]:
    draft.claims.put(transfer.address, transfer)
    return ()


def _replace_platform(_draft: Draft, transfer: PlatformReplaced) -> tuple[Leg, ...]:
    _check_id(transfer, f"platform:{transfer.new}")
    return ()


def _take_over(_draft: Draft, _transfer: WriterOpened) -> tuple[Leg, ...]:
    return ()


def _note_seal(draft: Draft, transfer: JournalSealed) -> tuple[Leg, ...]:
    draft.seals.put(str(transfer.through), transfer.sha256)
    return ()


def _note_loss(draft: Draft, transfer: LossNoted) -> tuple[Leg, ...]:
    add(draft.facts, "lost", transfer.num_entries)
    return ()


def _accept_loss(draft: Draft, transfer: LossAccepted) -> tuple[Leg, ...]:
    lost = draft.fact("lost")
    if not lost:
        raise Conflict("the ledger did not go back: there is nothing to accept")
    if lost != transfer.num_entries:
        raise Conflict(f"the ledger went back by {lost}: check that this is right, then accept {lost}")
    draft.facts.put("lost", None)
    return ()


def _cover_loss(draft: Draft, transfer: LossCovered) -> tuple[Leg, ...]:
    owner = user_available(transfer.address)
    legs = _book(draft, transfer, {owner: -transfer.lamports, PLATFORM: transfer.lamports})
    add(draft.facts, "revenue_left", -transfer.lamports)
    return legs


def _check_free(draft: Draft, transfer: PlannedPayout | HeldPaid | HeldReleased, account: Account) -> None:
    if transfer.lamports > draft.free(account):
        raise LedgerError(
            f"{transfer.id}: of {account} only {draft.free(account)} lamports have matured",
            code="not_matured",
        )


def _check_id(transfer: Transfer, expected: str) -> None:
    """Ids follow from what they are of: an id that is used once then stands for a job that ends once."""
    if transfer.id != expected:
        raise LedgerError(f"{transfer.id} has to be {expected}")


_RULES: Mapping[type[Transfer], Callable[[Draft, Any], tuple[Leg, ...]]] = {
    Deposit: _deposit,
    Suspended: _suspend,
    SuspenseCredited: _credit_suspense,
    UnknownOut: _unknown_out,
    Reserve: _reserve,
    Settle: _settle,
    Release: _release,
    Expire: _release,
    Disputed: _dispute,
    DisputeDismissed: _dispute,
    Reversed: _dispute,
    HeldPaid: _held,
    HeldReleased: _held,
    PayoutPlanned: _plan,
    WithdrawalPlanned: _plan,
    RevenueTaken: _plan,
    PayoutPaid: _end_payout,
    PayoutRefused: _end_payout,
    KeyOpened: _open_key,
    KeyRevoked: _revoke_key,
    NodeEnrolled: _enrol,
    NodeRemoved: _remove_node,
    EarningsClaimed: _claim,
    PlatformReplaced: _replace_platform,
    WriterOpened: _take_over,
    JournalSealed: _note_seal,
    LossNoted: _note_loss,
    LossAccepted: _accept_loss,
    LossCovered: _cover_loss,
}
