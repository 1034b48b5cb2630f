"""What an admin signed, and the transfer that carries it out, once."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from azu.auth.signatures import (
    AcceptLoss,
    AdminCommand,
    ConfirmPayout,
    CoverLoss,
    CreditSuspense,
    DismissDispute,
    PayHeld,
    ReleaseHeld,
    RemoveNode,
    ReverseJob,
    TakeRevenue,
    command_of,
)
from azu.errors import Conflict, Forbidden, LedgerError, NotFound
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import (
    DisputeDismissed,
    HeldPaid,
    HeldReleased,
    LossAccepted,
    LossCovered,
    NodeRemoved,
    PayoutPaid,
    RevenueTaken,
    Reversed,
    SuspenseCredited,
    Transfer,
)
from azu.money.signer.policy import nonce_for
from azu.money.signer.views import PayoutKind

# What the ledger says of a decision that comes too late, or too early.
_REFUSALS = ("matured", "node_removed", "not_matured", "unknown_node")


async def carry_out(text: str, ledger: Ledger, platform: str, admins: Collection[str], now_ms: int) -> None:
    """Carry out a signed command of a platform's admin, once; the same one again changes nothing.

    Raises Forbidden, Conflict and NotFound, as azu/money/books.py says.
    """
    command = command_of(text, (platform,), admins)
    if command is None:
        raise Forbidden("no admin of this network signed this command", code="no_admin")
    if isinstance(command, CoverLoss) and command_of(text, (platform,), {command.address}) is None:
        raise Forbidden("an admin covers a loss from his own account", param="address", code="no_admin")
    used = await ledger.result(_id_of(command))
    if used is not None and getattr(used.entry.transfer, "command", None) == text:
        return
    if used is not None:
        message = f"the nonce {command.nonce} was used before, or what the command is about has ended"
        raise Conflict(message, param="nonce", code="nonce_used")
    if command.expires_at_ms <= now_ms:
        raise Forbidden("this command has expired", param="expires_at_ms", code="command_expired")
    if isinstance(command, AcceptLoss) and await ledger.hash_at(command.number) != command.hash:
        message = f"the books do not have entry {command.number} as the command names it"
        raise Conflict(message, param="number")
    with refusals_as_conflicts():
        await ledger.apply(_transfer_of(command, text, ledger.state, now_ms))


@contextmanager
def refusals_as_conflicts() -> Iterator[None]:
    """Raise Conflict where the ledger refuses a decision that comes too late, or too early."""
    try:
        yield
    except LedgerError as error:
        if error.code not in _REFUSALS:
            raise
        raise Conflict(error.message, code=error.code) from error


def _id_of(command: AdminCommand) -> str:
    """Return the id of the command's one transfer: the ledger takes an id once, so a nonce is used once."""
    if isinstance(command, TakeRevenue):
        return f"{command.payout_id}:planned"
    if isinstance(command, ConfirmPayout):
        return f"{command.payout_id}:paid"
    if isinstance(command, ReverseJob | DismissDispute):
        return f"decided:{command.job_id}"  # a job is decided once, and what was decided is found by it
    return f"command:{command.kind}:{command.nonce}"


def _transfer_of(command: AdminCommand, text: str, state: BooksState, now_ms: int) -> Transfer:
    """Return the transfer for a command; `text` is the command with its signature, which the entry keeps.

    Revenue is set aside under a nonce of now; the treasury takes the payout up. Raises NotFound where the
    books have no such row in suspense, or no such open payout.
    """
    transfer_id = _id_of(command)
    match command:
        case ReverseJob() | DismissDispute():
            decision = Reversed if isinstance(command, ReverseJob) else DisputeDismissed
            return decision(id=transfer_id, job_id=command.job_id, command=text)
        case PayHeld() | ReleaseHeld():
            kind = HeldPaid if isinstance(command, PayHeld) else HeldReleased
            return kind(
                id=transfer_id,
                node_id=command.node_id,
                address=command.address,
                lamports=command.lamports,
                command=text,
            )
        case RemoveNode():
            return NodeRemoved(id=transfer_id, node_id=command.node_id, command=text)
        case CreditSuspense():
            waiting = state.suspense.get(command.row)
            if waiting is None:
                raise NotFound(f"no row {command.row} is in suspense", param="row", code="row_not_found")
            return SuspenseCredited(
                id=transfer_id,
                row=command.row,
                address=command.address,
                lamports=waiting.lamports,
                command=text,
            )
        case TakeRevenue() | CoverLoss() | ConfirmPayout():
            return _of_platform(command, text, state, now_ms)
        case AcceptLoss():
            return LossAccepted(id=transfer_id, num_entries=state.facts.get("lost", 0), command=text)


def _of_platform(
    command: TakeRevenue | CoverLoss | ConfirmPayout, text: str, state: BooksState, now_ms: int
) -> RevenueTaken | LossCovered | PayoutPaid:
    transfer_id = _id_of(command)
    match command:
        case ConfirmPayout():
            if command.payout_id not in state.payouts:
                message = f"no payout {command.payout_id} is open"
                raise NotFound(message, param="payout_id", code="payout_not_found")
            return PayoutPaid(id=transfer_id, payout_id=command.payout_id, command=text)
        case CoverLoss():
            return LossCovered(
                id=transfer_id, address=command.address, lamports=command.lamports, command=text
            )
        case TakeRevenue():
            return RevenueTaken(
                id=transfer_id,
                payout_id=command.payout_id,
                address=command.address,
                lamports=command.lamports,
                nonce=nonce_for(PayoutKind.REVENUE, command.payout_id, now_ms),
                command=text,
            )
