"""A payout's way from the ledger to the chain and back, as a value that changes state by state.

    planned -> signed -> sent -> accepted -> paid
       |         |         |-----------------> paid
       '---------'---------'-> abandoned ----> paid | refused

Every state is durable before the step that it announces: a payer that finds a payout in any state, after any
crash, advances it without a lamport lost or paid twice.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from pydantic import ConfigDict, TypeAdapter

from azu.money.chain.rows import NONCE_AHEAD_MS
from azu.money.ledger.transfers import (
    PayoutPaid,
    PayoutPlanned,
    PayoutRefused,
    PlannedPayout,
    RevenueTaken,
    WithdrawalPlanned,
)
from azu.money.signer.views import OpenPayout, PayoutKind, TransferRequest


class PayoutState(StrEnum):
    """How far a payout has come."""

    PLANNED = "planned"  # written; the ledger may or may not have set the money aside
    SIGNED = "signed"  # the ledger has; the bytes are stored and were never posted
    SENT = "sent"  # posted at least once, or about to be; whether the chain executed it is unknown
    ACCEPTED = "accepted"  # the chain said that it executed it; its ledger has to show it
    ABANDONED = "abandoned"  # never posted again: its nonce is being used up, then the ledger decides
    PAID = "paid"  # the chain's ledger shows it; azu's books may or may not
    REFUSED = "refused"  # the chain can never execute it; azu's books may or may not say so


@dataclass(frozen=True, slots=True, kw_only=True)
class Payout:
    """One payment to a worker who earned it, to a user who withdraws it, or of the platform's own money.

    The chain's ledger cannot show the payout before `since_ms`, a time of the chain. `body` is the signed
    action, posted unchanged; `attempts` and `tried_at_ms` count its posts. `burned_at_ms` is when the chain
    confirmed that the nonce of an abandoned payout is used up, 0 before. `expires_at_ms` is of the user's
    own signed withdrawal, `proof` its signature or the command that takes revenue.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    payout_id: str
    address: str
    lamports: int
    planned_at_ms: int
    since_ms: int
    state: PayoutState = PayoutState.PLANNED
    nonce: int = 0
    body: str = ""
    attempts: int = 0
    tried_at_ms: int = 0
    burned_at_ms: int = 0
    tx_hash: str = ""
    reason: str = ""
    kind: PayoutKind = PayoutKind.EARNINGS
    expires_at_ms: int = 0
    proof: str = ""

    @classmethod
    def of_books(cls, payout: OpenPayout) -> "Payout":
        """Return a payout that the books have set money aside for, as it was before it was sent."""
        return cls(
            payout_id=payout.payout_id,
            address=payout.address,
            lamports=payout.lamports,
            planned_at_ms=payout.nonce,
            since_ms=payout.nonce - NONCE_AHEAD_MS,
            nonce=payout.nonce,
            kind=payout.kind,
            expires_at_ms=payout.expires_at_ms,
            proof=payout.proof,
        )

    @property
    def request(self) -> TransferRequest:
        """What the signer is asked to sign."""
        return TransferRequest(self.payout_id, self.kind, self.address, self.lamports, self.nonce)

    def numbered(self, nonce: int) -> "Payout":
        """Fix the nonce under which the payout is sent, and no other."""
        assert self.state is PayoutState.PLANNED
        return replace(self, nonce=nonce)

    def signed(self, body: str) -> "Payout":
        """Store the bytes."""
        assert self.state is PayoutState.PLANNED
        return replace(self, state=PayoutState.SIGNED, body=body)

    def sending(self, now_ms: int) -> "Payout":
        """Announce a post."""
        assert self.state in (PayoutState.SIGNED, PayoutState.SENT)
        return replace(self, state=PayoutState.SENT, attempts=self.attempts + 1, tried_at_ms=now_ms)

    def accepted(self) -> "Payout":
        """Note that the chain said yes."""
        assert self.state is PayoutState.SENT
        return replace(self, state=PayoutState.ACCEPTED, reason="")

    def failed(self, reason: str) -> "Payout":
        """Note why a post, or the burning of the nonce, did not work."""
        return replace(self, reason=reason)

    def abandoned(self, reason: str) -> "Payout":
        """Give the payout up: from here on its bytes are never posted, and its nonce is burned."""
        assert self.state in (PayoutState.PLANNED, PayoutState.SIGNED, PayoutState.SENT)
        assert self.nonce
        return replace(self, state=PayoutState.ABANDONED, reason=reason, attempts=0, tried_at_ms=0)

    def burning(self, now_ms: int) -> "Payout":
        """Announce a post of the action that uses up the nonce."""
        assert self.state is PayoutState.ABANDONED
        return replace(self, attempts=self.attempts + 1, tried_at_ms=now_ms)

    def burned(self, now_ms: int) -> "Payout":
        """Note that the nonce is used up: by the payout, or by the action that burned it."""
        assert self.state is PayoutState.ABANDONED
        return replace(self, burned_at_ms=now_ms)

    def paid(self, tx_hash: str) -> "Payout":
        """Note that the chain's ledger shows the payout."""
        assert self.nonce
        return replace(self, state=PayoutState.PAID, tx_hash=tx_hash)

    def refused(self) -> "Payout":
        """Note that the chain's ledger does not show the payout and never will."""
        assert self.state is PayoutState.ABANDONED
        assert self.burned_at_ms
        return replace(self, state=PayoutState.REFUSED)

    @property
    def backoff_ms(self) -> int:
        """The time after `tried_at_ms` at which the next try is due."""
        return min(60_000, 500 << min(self.attempts, 7))

    @property
    def booking(self) -> PlannedPayout | PayoutPaid | PayoutRefused:
        """The ledger's transfer for the state; its fixed id makes the ledger apply it once."""
        match self.state:
            case PayoutState.PLANNED:
                return self._plan()
            case PayoutState.PAID:
                return PayoutPaid(id=f"{self.payout_id}:paid", payout_id=self.payout_id)
            case PayoutState.REFUSED:
                return PayoutRefused(id=f"{self.payout_id}:refused", payout_id=self.payout_id)
        raise AssertionError(f"nothing to book in state {self.state}")

    def _plan(self) -> PlannedPayout:
        id_, payout_id = f"{self.payout_id}:planned", self.payout_id
        address, lamports, nonce = self.address, self.lamports, self.nonce
        match self.kind:
            case PayoutKind.EARNINGS:
                return PayoutPlanned(
                    id=id_, payout_id=payout_id, address=address, lamports=lamports, nonce=nonce
                )
            case PayoutKind.WITHDRAWAL:
                return WithdrawalPlanned(
                    id=id_,
                    payout_id=payout_id,
                    address=address,
                    lamports=lamports,
                    nonce=nonce,
                    expires_at_ms=self.expires_at_ms,
                    signature=self.proof,
                )
            case PayoutKind.REVENUE:
                return RevenueTaken(
                    id=id_,
                    payout_id=payout_id,
                    address=address,
                    lamports=lamports,
                    nonce=nonce,
                    command=self.proof,
                )


_PAYOUT = TypeAdapter(Payout)


def encode_payout(payout: Payout) -> str:
    """Return the payout's one JSON text; fields that a later version adds do not change it."""
    return _PAYOUT.dump_json(payout, exclude_defaults=True).decode()


def decode_payout(content: str) -> Payout:
    """Parse the text of a payout."""
    return _PAYOUT.validate_json(content)
