"""What the client returns: frozen values, read from the ingress's JSON."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from azu.api.base import _LENIENT
from azu.units import MAX_LAMPORTS


@dataclass(frozen=True, slots=True)
class Balance:
    """What an address may spend, what its running jobs hold, and what is being sent back to it."""

    __pydantic_config__ = _LENIENT

    address: str
    available_lamports: int
    reserved_lamports: int
    withdrawing_lamports: int = 0


@dataclass(frozen=True, slots=True)
class KeyLine:
    """An API key without its secret. `spent_lamports` counts running jobs by the most they can cost."""

    __pydantic_config__ = _LENIENT

    key_id: str
    label: str
    created_at_ms: int
    expires_at_ms: int | None
    spend_limit_lamports: int | None
    spent_lamports: int | None


@dataclass(frozen=True, slots=True)
class Platform:
    """Where deposits go: the platform's address on the chain at `chain_url`."""

    __pydantic_config__ = _LENIENT

    address: str
    chain_url: str


@dataclass(frozen=True, slots=True)
class DepositState:
    """`status` is "credited", or "pending" when the chain does not show the transfer yet."""

    __pydantic_config__ = _LENIENT

    status: str
    lamports: int
    transfer_id: str


@dataclass(frozen=True, slots=True)
class WithdrawalLine:
    """`state` is "waiting", "sending", "paid", or "refused" for the `reason`."""

    __pydantic_config__ = _LENIENT

    nonce: int
    state: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Earnings:
    """What an address earned by lending and has not got yet, what is on its way, and what was paid.

    Nothing is paid before the address has `claimed` it.
    """

    __pydantic_config__ = _LENIENT

    address: str
    earned_lamports: int
    paying_lamports: int
    paid_lamports: int
    payout_threshold_lamports: int
    claimed: bool = False


class DepositRequest(BaseModel):
    """POST /deposit: a hint where to look, never proof."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tx_sig: str = Field(max_length=128)
    user_address: str = Field(max_length=64)


class ClaimRequest(BaseModel):
    """POST /v1/earnings/claim: `signature` is the EIP-712 signature of the key's address."""

    model_config = ConfigDict(extra="forbid", strict=True)

    signature: str = Field(max_length=256)


_LONGEST_LIFE_S = 10 * 365 * 86_400
# Counted by a script whose numbers are doubles.
_LARGEST_LIMIT = 2**53


class _KeyBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ChallengeRequest(_KeyBody):
    """POST /v1/auth/challenge."""

    address: str = Field(max_length=64)


class KeyRequest(_KeyBody):
    """POST /v1/auth/keys: without an end the key is good until it is revoked, without a limit for all."""

    nonce: str = Field(max_length=128)
    signature: str = Field(max_length=256)
    label: str = Field(default="", max_length=64)
    expires_in_s: int | None = Field(default=None, ge=1, le=_LONGEST_LIFE_S)
    spend_limit_lamports: int | None = Field(default=None, ge=0, le=_LARGEST_LIMIT)


_MAX_NONCE = 2**63 - 1


class WithdrawalRequest(BaseModel):
    """POST /v1/withdrawals: `signature` is the EIP-712 signature of the key's address over the rest."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lamports: int = Field(ge=0, le=MAX_LAMPORTS)
    nonce: int = Field(ge=0, le=_MAX_NONCE)
    expires_at_ms: int = Field(ge=0, le=_MAX_NONCE)
    signature: str = Field(max_length=256)
