"""Money set aside under a name until exactly one transfer ends the hold: reservations and payouts."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from azu.errors import LedgerError
from azu.ledger.accounts import (
    Account,
    user_available,
    user_reserved,
    user_withdrawing,
    worker_earned,
    worker_paying,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What a job holds of its user's money; `ended_by` is the id of the transfer that ended it."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    job_id: str
    address: str
    lamports: int
    expires_at_ms: int
    ended_by: str | None = None
    kind: Literal["reservation"] = "reservation"

    @property
    def source(self) -> Account:
        """Where the money came from and goes back to."""
        return user_available(self.address)

    @property
    def account(self) -> Account:
        """Where the money stands while the hold is open."""
        return user_reserved(self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Payout:
    """Money on its way to the wallet of a worker, or of a user who withdraws."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    payout_id: str
    address: str
    lamports: int
    payee: Literal["worker", "user"]
    ended_by: str | None = None
    kind: Literal["payout"] = "payout"

    @property
    def source(self) -> Account:
        """Where the money came from and goes back to."""
        return worker_earned(self.address) if self.payee == "worker" else user_available(self.address)

    @property
    def account(self) -> Account:
        """Where the money stands while the hold is open."""
        return worker_paying(self.address) if self.payee == "worker" else user_withdrawing(self.address)


Hold = Reservation | Payout

_ADAPTER: TypeAdapter[Hold] = TypeAdapter(Annotated[Hold, Field(discriminator="kind")])


def reservation_name(job_id: str) -> str:
    """Return the name under which a job's reservation is kept."""
    return f"job:{job_id}"


def payout_name(payout_id: str) -> str:
    """Return the name under which a payout is kept."""
    return f"payout:{payout_id}"


def ended(hold: Hold, transfer_id: str) -> Hold:
    """Return the hold as the transfer leaves it."""
    return replace(hold, ended_by=transfer_id)


def encode_hold(hold: Hold) -> str:
    """Return the hold's one JSON text."""
    return _ADAPTER.dump_json(hold).decode()


def decode_hold(content: str) -> Hold:
    """Parse the text of a hold; raises LedgerError."""
    try:
        return _ADAPTER.validate_json(content)
    except ValidationError as error:
        raise LedgerError(f"not a hold: {content[:200]!r}") from error
