"""Users take their money back: by a signature of their own address, never by a bearer key alone."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from azu.auth.withdrawals import LONGEST_LIFE_MS, Withdrawal, is_signed
from azu.errors import Conflict, Forbidden, InsufficientBalance, InvalidRequest
from azu.ledger.accounts import user_available
from azu.ledger.transfers import MAX_LAMPORTS, Transfer, WithdrawalPlanned
from azu.treasury.withdrawals import LEAST_LAMPORTS, Signed
from azu.units import hype_from_lamports
from deployments.accounts import Key, ServicesNow
from deployments.services import Services, now_ms

router = APIRouter()
_MAX_NONCE = 2**63 - 1


class WithdrawalRequest(BaseModel):
    """POST /v1/withdrawals: `signature` is the EIP-712 signature of the key's address over the rest."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lamports: int = Field(ge=0, le=MAX_LAMPORTS)
    nonce: int = Field(ge=0, le=_MAX_NONCE)
    expires_at_ms: int = Field(ge=0, le=_MAX_NONCE)
    signature: str = Field(max_length=256)


@router.post("/v1/withdrawals")
async def withdraw(body: WithdrawalRequest, key: Key, services: ServicesNow) -> dict[str, Any]:
    """Hand a signed withdrawal to the treasury; the same one sent again changes nothing."""
    if body.lamports < LEAST_LAMPORTS:
        least = hype_from_lamports(LEAST_LAMPORTS)
        raise InvalidRequest(f"a withdrawal is of at least {least} HYPE", param="lamports")
    withdrawal = Withdrawal(
        address=key.address, lamports=body.lamports, nonce=body.nonce, expires_at_ms=body.expires_at_ms
    )
    if not is_signed(withdrawal, services.config.platform_address, body.signature):
        raise Forbidden("this withdrawal was not signed by the key's address", param="signature")
    if not 0 < body.expires_at_ms - now_ms() <= LONGEST_LIFE_MS:
        raise InvalidRequest("a withdrawal is good for at most a day, from now on", param="expires_at_ms")
    planned = await services.ledger.result(f"{withdrawal.payout_id}:planned")
    if planned is None:
        available = await services.ledger.balance(user_available(key.address))
        if body.lamports > available:
            raise InsufficientBalance(f"the account holds {available} lamports; this takes {body.lamports}")
        await services.withdrawals.hand_in(Signed(withdrawal, body.signature))
    elif not _carries_out(planned.entry.transfer, withdrawal):
        raise Conflict("this nonce was used before for another withdrawal", param="nonce")
    return await _state(services, withdrawal)


@router.get("/v1/withdrawals/{nonce}")
async def withdrawal(nonce: int, key: Key, services: ServicesNow) -> dict[str, Any]:
    """Return how far one of the key's address's withdrawals is."""
    return await _state(services, Withdrawal(address=key.address, lamports=0, nonce=nonce, expires_at_ms=0))


def _carries_out(transfer: Transfer, withdrawal: Withdrawal) -> bool:
    return isinstance(transfer, WithdrawalPlanned) and transfer.lamports == withdrawal.lamports


async def _state(services: Services, named: Withdrawal) -> dict[str, Any]:
    state, reason = await services.withdrawals.state(named, services.ledger)
    return {"nonce": named.nonce, "state": state.value, "reason": reason}
