"""Deposits, balances and earnings over HTTP."""

from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request

from azu.api.accounts import ChallengeRequest, ClaimRequest, DepositRequest, KeyRequest, WithdrawalRequest
from azu.auth.api_keys import ApiKey
from azu.auth.signatures import LONGEST_LIFE_MS, Withdrawal, is_signed
from azu.clock import wall_clock_ms
from azu.errors import Conflict, Forbidden, InsufficientBalance, InvalidRequest
from azu.money.ledger.transfers import (
    Transfer,
    WithdrawalPlanned,
    user_available,
    user_reserved,
    user_withdrawing,
    worker_earned,
    worker_paid,
    worker_paying,
)
from azu.money.treasury.withdrawals import LEAST_LAMPORTS, SignedWithdrawal
from azu.units import hype_from_lamports
from deployments.services import Key, Services, ServicesNow

router = APIRouter()


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


@router.post("/v1/auth/challenge")
async def challenge(body: ChallengeRequest, request: Request, services: ServicesNow) -> dict[str, str]:
    """Return a text to sign with the address's wallet."""
    await services.count_sign_in(request.client)
    made = await services.auth.challenge(body.address, services.config.domain, wall_clock_ms())
    return {"nonce": made.nonce, "message": made.message}


@router.post("/v1/auth/keys")
async def open_key(body: KeyRequest, request: Request, services: ServicesNow) -> dict[str, str]:
    """Return a new bearer key for a signed challenge; only its hash is kept here."""
    await services.count_sign_in(request.client)
    now = wall_clock_ms()
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
        await services.spend_limits.correct(key, wall_clock_ms())
        spent = await services.spending.spent(key.key_id)
    return {
        "key_id": key.key_id,
        "label": key.label,
        "created_at_ms": key.created_at_ms,
        "expires_at_ms": key.expires_at_ms,
        "spend_limit_lamports": key.spend_limit_lamports,
        "spent_lamports": spent,
    }


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
    if not 0 < body.expires_at_ms - wall_clock_ms() <= LONGEST_LIFE_MS:
        raise InvalidRequest("a withdrawal is good for at most a day, from now on", param="expires_at_ms")
    planned = await services.ledger.result(f"{withdrawal.payout_id}:planned")
    if planned is None:
        available = await services.ledger.balance(user_available(key.address))
        if body.lamports > available:
            raise InsufficientBalance(f"the account holds {available} lamports; this takes {body.lamports}")
        await services.withdrawals.hand_in(SignedWithdrawal(withdrawal, body.signature))
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
