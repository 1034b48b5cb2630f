"""Which transfer carries out what an admin signed."""

from azu.auth.signatures import (
    AcceptLoss,
    AdminCommand,
    CreditSuspense,
    DismissDispute,
    PayHeld,
    ReleaseHeld,
    RemoveNode,
    ReverseJob,
    TakeRevenue,
)
from azu.errors import InvalidRequest, NotFound
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import (
    DisputeDismissed,
    HeldPaid,
    HeldReleased,
    NodeRemoved,
    Reversed,
    SuspenseCredited,
    Transfer,
)


def command_id(command: AdminCommand) -> str:
    """Return the id of the command's one transfer: the ledger takes an id once, so a nonce is used once."""
    return f"command:{command.kind}:{command.nonce}"


def transfer_of(command: AdminCommand, text: str, state: BooksState) -> Transfer:
    """Return the transfer for a command; `text` is the command with its signature, which the entry keeps.

    Raises NotFound where the books have no such row in suspense, InvalidRequest for a command that the
    books do not carry out.
    """
    transfer_id = command_id(command)
    match command:
        case ReverseJob():
            return Reversed(id=transfer_id, job_id=command.job_id, command=text)
        case DismissDispute():
            return DisputeDismissed(id=transfer_id, job_id=command.job_id, command=text)
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
        case TakeRevenue() | AcceptLoss():
            raise InvalidRequest(f"{command.kind} is no command that the books carry out", param="kind")
