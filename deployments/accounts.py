"""Deposits, balances and earnings over HTTP."""

from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from azu.auth.keys import ApiKey
from azu.errors import Forbidden
from azu.ledger.accounts import (
    user_available,
    user_reserved,
    user_withdrawing,
    worker_earned,
    worker_paid,
    worker_paying,
)
from deployments.services import Services

router = APIRouter()


def services_of(request: Request) -> Services:
    """Return the replica's services."""
    services: Services = request.app.state.services
    return services


ServicesNow = Annotated[Services, Depends(services_of)]


async def key_of(services: ServicesNow, authorization: Annotated[str | None, Header()] = None) -> ApiKey:
    """Return the caller's key; raises Unauthenticated."""
    return await services.owner(authorization)


Key = Annotated[ApiKey, Depends(key_of)]


class DepositRequest(BaseModel):
    """POST /deposit: a hint where to look, never proof."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tx_sig: str = Field(max_length=128)
    user_address: str = Field(max_length=64)


class ClaimRequest(BaseModel):
    """POST /v1/earnings/claim: `signature` is the EIP-712 signature of the key's address."""

    model_config = ConfigDict(extra="forbid", strict=True)

    signature: str = Field(max_length=256)


@router.get("/v1/platform")
async def platform(services: ServicesNow) -> dict[str, str]:
    """Return where deposits go, and which version of azu runs here."""
    return {
        "address": services.config.platform_address,
        "chain_url": services.config.chain_url,
        "version": version("azu"),
    }


@router.post("/deposit")
async def deposit(
    body: DepositRequest, services: ServicesNow, authorization: Annotated[str | None, Header()] = None
) -> dict[str, Any]:
    """Have the treasury look for a transfer at once and say what it found."""
    key = await services.owner(authorization, body.user_address)
    timeout_s = services.config.policy.timeouts.deposit_s
    verdict = await services.claims.ask(body.tx_sig, key.address, timeout_s)
    return {
        "status": verdict.status,
        "lamports": verdict.lamports,
        "transfer_id": f"deposit:{body.tx_sig.lower()}",
    }


@router.get("/v1/balance")
async def balance(key: Key, services: ServicesNow) -> dict[str, Any]:
    """Return what the key's address may spend, what its jobs hold and what is being sent back to it."""
    accounts = (user_available(key.address), user_reserved(key.address), user_withdrawing(key.address))
    available, reserved, withdrawing = await services.ledger.balances_of(*accounts)
    return {
        "address": key.address,
        "available_lamports": available,
        "reserved_lamports": reserved,
        "withdrawing_lamports": withdrawing,
    }


@router.get("/v1/earnings")
async def earnings(
    key: Key,
    services: ServicesNow,
    address: Annotated[str | None, Query(max_length=64)] = None,
    authorization: Annotated[str | None, Header()] = None,
) -> dict[str, Any]:
    """Return what the key's address earned by lending, what is on its way and what was paid."""
    if address is not None:
        await services.owner(authorization, address)
    accounts = (worker_earned(key.address), worker_paying(key.address), worker_paid(key.address))
    earned, paying, paid = await services.ledger.balances_of(*accounts)
    return {
        "address": key.address,
        "earned_lamports": earned,
        "paying_lamports": paying,
        "paid_lamports": paid,
        "payout_threshold_lamports": services.config.policy.payout_threshold_lamports,
        "claimed": await services.payees.has_claimed(key.address),
    }


@router.post("/v1/earnings/claim")
async def claim_earnings(body: ClaimRequest, key: Key, services: ServicesNow) -> dict[str, Any]:
    """Have what the key's address earned paid to it, from the threshold on."""
    if not await services.payees.claim(key.address, body.signature):
        raise Forbidden("this claim was not signed by the key's address", param="signature")
    return {"address": key.address, "claimed": True}
