"""Accounts over HTTP: sign-in and keys, deposits, balances, earnings and withdrawals."""

from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Query, Request

from azu.api.accounts import (
    BalanceResponse,
    ChallengeRequest,
    ChallengeResponse,
    ClaimedEarnings,
    ClaimRequest,
    DepositRequest,
    DepositState,
    EarnedLine,
    EarningsResponse,
    KeyLine,
    KeyList,
    KeyRequest,
    NewKey,
    Platform,
    SuccessionLine,
    WithdrawalLine,
    WithdrawalRequest,
)
from azu.api.base import Revoked
from azu.auth.signatures import Withdrawal
from azu.clock import wall_clock_ms
from azu.jobs.earned import KEPT_DAYS
from azu.money.books import KeySpending
from azu.money.chain.networks import network_at
from deployments.services import Bearer, Key, ServicesNow, check_speaks_for

router = APIRouter()


@router.get("/v1/platform")
async def platform(services: ServicesNow) -> Platform:
    """Return where deposits go, what names this network, and which version of azu runs here."""
    config = services.config
    chain = network_at(config.chain_url)
    return Platform(
        address=config.platform_address,
        chain_url=config.chain_url,
        version=version("azu"),
        network_id=config.network_id,
        authority=config.authority,
        nodes=config.nodes.value,
        key_day_lamports=config.policy.limits.key_day_lamports,
        successions=tuple(SuccessionLine(**asdict(one)) for one in config.successions),
        dashboard_url=config.dashboard_url,
        hype_token=chain.hype,
        is_mainnet=chain.is_mainnet,
    )


@router.post("/deposit")
async def deposit(body: DepositRequest, key: Key, services: ServicesNow) -> DepositState:
    """Have the treasury look for a transfer at once and return what it found."""
    check_speaks_for(key, body.user_address)
    await services.count_deposit(key, body.tx_sig)
    timeout_s = services.config.policy.timeouts.deposit_s
    found = await services.books.deposit(body.tx_sig, key.address, timeout_s)
    if found.state == "credited":
        services.note_credited(key, body.tx_sig)
    return DepositState(
        status=found.state, lamports=found.lamports, transfer_id=f"deposit:{body.tx_sig.lower()}"
    )


@router.get("/v1/balance")
async def balance(key: Key, services: ServicesNow) -> BalanceResponse:
    """Return what the key's address may spend, what its jobs hold and what is on its way back to it."""
    balance = await services.books.balance(key.address)
    return BalanceResponse(address=key.address, **asdict(balance))


@router.get("/v1/earnings")
async def earnings(
    key: Key,
    services: ServicesNow,
    address: Annotated[str | None, Query(max_length=64)] = None,
    days: Annotated[int, Query(ge=1, le=KEPT_DAYS)] = 1,
) -> EarningsResponse:
    """Return what the key's address earned by lending, what is on its way and what was paid."""
    if address is not None:
        check_speaks_for(key, address)
    earnings = await services.books.earnings(key.address)
    by_hour = await services.earned.of(key.address, days, wall_clock_ms())
    return EarningsResponse(
        address=key.address,
        by_hour=tuple(EarnedLine.model_validate(one) for one in by_hour),
        payout_threshold_lamports=services.config.policy.payout_threshold_lamports,
        **asdict(earnings),
    )


@router.post("/v1/earnings/claim")
async def claim_earnings(body: ClaimRequest, key: Key, services: ServicesNow) -> ClaimedEarnings:
    """Have the treasury pay the key's address what it earns, from the threshold on."""
    await services.books.claim_earnings(key.address, body.signature)
    return ClaimedEarnings(address=key.address, claimed=True)


@router.post("/v1/auth/challenge")
async def challenge(body: ChallengeRequest, request: Request, services: ServicesNow) -> ChallengeResponse:
    """Return a text to sign with the address's wallet, which opens the key with this hash."""
    await services.count_sign_in(request.client)
    made = await services.challenges.challenge(
        body.address,
        body.key_sha256,
        services.config.domain,
        wall_clock_ms(),
        label=body.label,
        expires_at_ms=body.expires_at_ms,
        spend_limit_lamports=body.spend_limit_lamports,
    )
    return ChallengeResponse(nonce=made.nonce, message=made.message, created_at_ms=made.key.created_at_ms)


@router.post("/v1/auth/keys")
async def open_key(body: KeyRequest, request: Request, services: ServicesNow) -> NewKey:
    """Open the key of a signed challenge; the network never sees the key before it is used."""
    await services.count_sign_in(request.client)
    key = await services.challenges.answered(body.nonce, body.signature, wall_clock_ms())
    await services.books.open_key(key)
    services.wrong_keys.note_good(key.digest)
    return NewKey(key_id=key.key_id, address=key.address)


@router.get("/v1/auth/keys")
async def keys(key: Key, services: ServicesNow) -> KeyList:
    """Return the keys of the caller's address, with what counts against their spend limits."""
    limit = services.config.policy.limits.key_day_lamports
    return KeyList(data=tuple(_line(one, limit) for one in await services.books.keys(key.address)))


@router.delete("/v1/auth/keys/{key_id}")
async def revoke(key_id: str, _: Key, bearer: Bearer, services: ServicesNow) -> Revoked:
    """Make a key of the caller's address invalid at once."""
    await services.books.revoke_key(bearer, key_id)
    return Revoked(revoked=key_id)


def _line(found: KeySpending, day_limit_lamports: int | None) -> KeyLine:
    key = found.key
    return KeyLine(
        key_id=key.key_id,
        label=key.label,
        created_at_ms=key.created_at_ms,
        expires_at_ms=key.expires_at_ms,
        spend_limit_lamports=key.spend_limit_lamports,
        spent_lamports=None if key.spend_limit_lamports is None else found.spent_lamports,
        day_limit_lamports=day_limit_lamports if key.spend_limit_lamports is None else None,
        spent_today_lamports=found.today_lamports,
    )


@router.post("/v1/withdrawals")
async def withdraw(body: WithdrawalRequest, key: Key, services: ServicesNow) -> WithdrawalLine:
    """Hand a signed withdrawal to the treasury; sending the same one again changes nothing."""
    withdrawal = Withdrawal(
        address=key.address, lamports=body.lamports, nonce=body.nonce, expires_at_ms=body.expires_at_ms
    )
    status = await services.books.withdraw(withdrawal, body.signature)
    return WithdrawalLine(nonce=body.nonce, **asdict(status))


@router.get("/v1/withdrawals/{nonce}")
async def withdrawal(nonce: int, key: Key, services: ServicesNow) -> WithdrawalLine:
    """Return how far a withdrawal of the key's address is."""
    status = await services.books.withdrawal(key.address, nonce)
    return WithdrawalLine(nonce=nonce, **asdict(status))
