"""Which transfers are deposits: pure rules over what the chain says."""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any

from azu.chain.replies import LedgerTransfer, TxDetails
from azu.errors import InvalidRequest
from azu.units import lamports_from_hype

HYPE_NAME = "HYPE"
_ACTIONS = ("sendAsset", "spotSend")
_SPOT = "spot"


class SightingState(StrEnum):
    """PENDING: good, but not in the platform's ledger yet. REJECTED: will never be credited."""

    UNKNOWN = "unknown"
    PENDING = "pending"
    CREDITED = "credited"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Sighting:
    """What the treasury knows of a hash. `sender` is the chain's, empty while the hash is unknown."""

    state: SightingState
    sender: str = ""
    lamports: int = 0
    reason: str = ""


def is_candidate(transfer: LedgerTransfer, platform: str) -> bool:
    """Whether a row of the platform's ledger may be a deposit; its token still has to be checked."""
    arrived = transfer.destination == platform and transfer.sender != platform and transfer.to_spot
    # An all-zero hash marks what no user's action caused: there is nothing to check it against.
    return arrived and transfer.token_name == HYPE_NAME and int(transfer.hash, 16) != 0


def judge(details: TxDetails, *, platform: str, hype: str) -> Sighting:
    """Say whether an action moved HYPE, by its exact token id, to the platform: PENDING or REJECTED."""
    action, sender = details.action, details.user
    if details.error is not None:
        reason = f"it failed on the chain: {details.error}"
    elif action.get("type") not in _ACTIONS:
        reason = "it is no transfer"
    elif _lower(action.get("destination")) != platform or action.get("destinationDex", _SPOT) != _SPOT:
        reason = "it was not sent to the platform's spot balance"
    elif action.get("token") != hype:
        reason = f"it moved {action.get('token')}, which is not {hype}"
    elif action.get("fromSubAccount"):
        reason = "it was sent from a sub-account, which has no key to log in with"
    else:
        try:
            return Sighting(SightingState.PENDING, sender, lamports_from_hype(str(action.get("amount"))))
        except InvalidRequest:
            reason = "its amount is not a whole number of lamports"
    return Sighting(SightingState.REJECTED, sender, reason=reason)


def agrees(row: LedgerTransfer, sighting: Sighting) -> bool:
    """Whether the ledger's row says the same as the action: sender and amount."""
    return row.sender == sighting.sender and same_amount(row.amount, sighting.lamports)


def same_amount(amount: str, lamports: int) -> bool:
    """Whether a decimal amount of HYPE is exactly that many lamports."""
    try:
        return Decimal(amount) == Decimal(lamports).scaleb(-8)
    except InvalidOperation:
        return False


def _lower(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""
