"""API keys over HTTP: opened by a wallet's signature, listed and revoked by another key."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from azu.auth.keys import ApiKey
from azu.errors import Forbidden
from deployments.accounts import Key, ServicesNow
from deployments.services import Services, now_ms

router = APIRouter()

_LONGEST_LIFE_S = 10 * 365 * 86_400
# Counted by a script whose numbers are doubles.
_LARGEST_LIMIT = 2**53


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ChallengeRequest(_Body):
    """POST /v1/auth/challenge."""

    address: str = Field(max_length=64)


class KeyRequest(_Body):
    """POST /v1/auth/keys: without an end the key is good until it is revoked, without a limit for all."""

    nonce: str = Field(max_length=128)
    signature: str = Field(max_length=256)
    label: str = Field(default="", max_length=64)
    expires_in_s: int | None = Field(default=None, ge=1, le=_LONGEST_LIFE_S)
    spend_limit_lamports: int | None = Field(default=None, ge=0, le=_LARGEST_LIMIT)


@router.post("/v1/auth/challenge")
async def challenge(body: ChallengeRequest, request: Request, services: ServicesNow) -> dict[str, str]:
    """Return a text to sign with the address's wallet."""
    await services.count_sign_in(request.client)
    made = await services.auth.challenge(body.address, services.config.domain, now_ms())
    return {"nonce": made.nonce, "message": made.message}


@router.post("/v1/auth/keys")
async def open_key(body: KeyRequest, request: Request, services: ServicesNow) -> dict[str, str]:
    """Return a new bearer key for a signed challenge; only its hash is kept here."""
    await services.count_sign_in(request.client)
    now = now_ms()
    secret, key = await services.auth.open_key(
        body.nonce,
        body.signature,
        body.label,
        now,
        expires_at_ms=None if body.expires_in_s is None else now + 1000 * body.expires_in_s,
        spend_limit_lamports=body.spend_limit_lamports,
        max_keys=services.config.policy.limits.max_keys,
    )
    return {"api_key": secret, "key_id": key.key_id, "address": key.address}


@router.get("/v1/auth/keys")
async def keys(key: Key, services: ServicesNow) -> dict[str, list[dict[str, Any]]]:
    """Return the keys of the caller's address, with what counts against their limits."""
    return {"data": [await _line(services, one) for one in await services.auth.list(key.address)]}


@router.delete("/v1/auth/keys/{key_id}")
async def revoke(key_id: str, key: Key, services: ServicesNow) -> dict[str, str]:
    """Make a key of the caller's address invalid at once."""
    restricted = key.expires_at_ms is not None or key.spend_limit_lamports is not None
    if restricted and key_id != key.key_id:
        raise Forbidden("a key with an end or a limit may only revoke itself", param="key_id")
    await services.auth.revoke(key.address, key_id)
    return {"revoked": key_id}


async def _line(services: Services, key: ApiKey) -> dict[str, Any]:
    spent = None
    if key.spend_limit_lamports is not None:
        await services.spend_limits.correct(key, now_ms())
        spent = await services.spending.spent(key.key_id)
    return {
        "key_id": key.key_id,
        "label": key.label,
        "created_at_ms": key.created_at_ms,
        "expires_at_ms": key.expires_at_ms,
        "spend_limit_lamports": key.spend_limit_lamports,
        "spent_lamports": spent,
    }
