"""Transfers for tests, complete and small; ids as azu gives them."""

from azu.money.ledger.transfers import (
    Deposit,
    Expire,
    PayoutPaid,
    PayoutPlanned,
    PayoutRefused,
    Release,
    Reserve,
    Settle,
    WithdrawalPlanned,
)
from tests.builders import ALICE, OWNERS


def deposit(lamports: int, *, address: str = ALICE, tx_hash: str = "0x01") -> Deposit:
    return Deposit(id=f"deposit:{tx_hash}", address=address, lamports=lamports)


def reserve(job: str, lamports: int, *, address: str = ALICE, expires_at_ms: int = 600_000) -> Reserve:
    return Reserve(
        id=f"reserve:{job}", address=address, job_id=job, lamports=lamports, expires_at_ms=expires_at_ms
    )


def settle(job: str, charged: int, **shares: int) -> Settle:
    """Charge a job: `w0=40` gives 40 lamports to the first of OWNERS; the platform gets the rest."""
    return Settle(
        id=f"settle:{job}",
        job_id=job,
        charged_lamports=charged,
        platform_lamports=charged - sum(shares.values()),
        shares={OWNERS[int(name[1:])]: lamports for name, lamports in shares.items()},
    )


def release(job: str) -> Release:
    return Release(id=f"release:{job}", job_id=job)


def expire(job: str) -> Expire:
    return Expire(id=f"expire:{job}", job_id=job)


def plan_payout(payout: str, lamports: int, *, address: str = OWNERS[0]) -> PayoutPlanned:
    return PayoutPlanned(id=f"payout:{payout}:planned", payout_id=payout, address=address, lamports=lamports)


def plan_withdrawal(payout: str, lamports: int, *, address: str = ALICE) -> WithdrawalPlanned:
    return WithdrawalPlanned(
        id=f"payout:{payout}:planned", payout_id=payout, address=address, lamports=lamports
    )


def paid(payout: str, *, fee_lamports: int = 0) -> PayoutPaid:
    return PayoutPaid(id=f"payout:{payout}:paid", payout_id=payout, fee_lamports=fee_lamports)


def refused(payout: str) -> PayoutRefused:
    return PayoutRefused(id=f"payout:{payout}:refused", payout_id=payout)
