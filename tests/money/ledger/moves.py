"""Transfers for tests, complete and small; ids as azu gives them.

A job's model has one layer at one lamport, so that its tokens are its lamports.
"""

import re

from azu.money.ledger.transfers import (
    Deposit,
    Disputed,
    DisputeDismissed,
    EarningsClaimed,
    Expire,
    HeldPaid,
    HeldReleased,
    KeyOpened,
    KeyRevoked,
    LossCovered,
    NodeEnrolled,
    NodeRemoved,
    PayoutPaid,
    PayoutPlanned,
    PayoutRefused,
    PlatformReplaced,
    Release,
    Reserve,
    RevenueTaken,
    Reversed,
    Settle,
    Suspended,
    SuspenseCredited,
    UnknownOut,
    WithdrawalPlanned,
)
from tests.builders import ALICE, OWNERS

SIGNATURE = "0x" + "5" * 130


def key_of(address: str) -> str:
    return f"key-{address[-8:]}"


def open_key(
    address: str = ALICE,
    *,
    key_id: str | None = None,
    limit: int | None = None,
    expires_at_ms: int | None = None,
) -> KeyOpened:
    key_id = key_id or key_of(address)
    return KeyOpened(
        id=f"key:{key_id}",
        key_id=key_id,
        digest="d" * 64,
        address=address,
        label="",
        created_at_ms=1,
        expires_at_ms=expires_at_ms,
        spend_limit_lamports=limit,
        text="open a key",
        signature=SIGNATURE,
    )


def revoke_key(key_id: str) -> KeyRevoked:
    return KeyRevoked(id=f"revoked:{key_id}", key_id=key_id)


def claim(address: str = OWNERS[0]) -> EarningsClaimed:
    return EarningsClaimed(id=f"claim:{address}", address=address, signature=SIGNATURE)


def enrol(node_id: str, payout: str = OWNERS[0], *, key_digest: str = "k", number: int = 1) -> NodeEnrolled:
    return NodeEnrolled(
        id=f"node:{node_id}:{number}",
        node_id=node_id,
        payout=payout,
        key_digest=key_digest,
        name=node_id,
        work_bytes_per_s=1,
    )


def remove_node(node_id: str, *, number: int = 1) -> NodeRemoved:
    return NodeRemoved(id=f"removed:{node_id}:{number}", node_id=node_id, command="it lies")


def deposit(lamports: int, *, address: str = ALICE, tx_hash: str = "0x01", at_ms: int = 0) -> Deposit:
    return Deposit(id=f"deposit:{tx_hash}", address=address, lamports=lamports, at_ms=at_ms)


def suspend(row: str, lamports: int, *, sender: str = ALICE, at_ms: int = 0) -> Suspended:
    return Suspended(id=f"suspended:{row}", sender=sender, lamports=lamports, row=row, at_ms=at_ms)


def credit_suspense(row: str, lamports: int, *, address: str = ALICE) -> SuspenseCredited:
    return SuspenseCredited(
        id=f"credited:{row}", row=row, address=address, lamports=lamports, command="credit it"
    )


def unknown_out(row: str, lamports: int, *, address: str = OWNERS[0]) -> UnknownOut:
    return UnknownOut(id=f"out:{row}", address=address, lamports=lamports, nonce=1)


def reserve(
    job: str,
    lamports: int,
    *,
    address: str = ALICE,
    expires_at_ms: int = 600_000,
    key_id: str | None = None,
) -> Reserve:
    return Reserve(
        id=f"reserve:{job}",
        address=address,
        job_id=job,
        expires_at_ms=expires_at_ms,
        key_id=key_id or key_of(address),
        model_id="test/model",
        revision="r1",
        num_layers=1,
        lamports_per_token_layer=1,
        platform_percent=20,
        prompt_tokens=0,
        max_tokens=lamports,
    )


def settle(
    job: str, charged: int, *, held: dict[str, int] | None = None, maturity_ms: int = 0, **shares: int
) -> Settle:
    """Charge a job: `w0=40` gives 40 lamports to the first of OWNERS; the platform gets the rest."""
    kept = sum(shares.values()) + sum((held or {}).values())
    return Settle(
        id=f"settle:{job}",
        job_id=job,
        completion_tokens=charged,
        charged_lamports=charged,
        platform_lamports=charged - kept,
        shares={OWNERS[int(name[1:])]: lamports for name, lamports in shares.items()},
        held=held or {},
        maturity_ms=maturity_ms,
    )


def release(job: str) -> Release:
    return Release(id=f"release:{job}", job_id=job)


def expire(job: str) -> Expire:
    return Expire(id=f"expire:{job}", job_id=job)


def dispute(job: str) -> Disputed:
    return Disputed(id=f"disputed:{job}", job_id=job, signature=SIGNATURE)


def dismiss(job: str) -> DisputeDismissed:
    return DisputeDismissed(id=f"dismissed:{job}", job_id=job, command="it was right")


def reverse(job: str) -> Reversed:
    return Reversed(id=f"reversed:{job}", job_id=job, command="it was wrong")


def pay_held(node_id: str, lamports: int, *, address: str = OWNERS[0], number: int = 1) -> HeldPaid:
    return HeldPaid(id=f"held-paid:{node_id}:{number}", node_id=node_id, address=address, lamports=lamports)


def release_held(node_id: str, lamports: int, *, address: str = ALICE) -> HeldReleased:
    return HeldReleased(
        id=f"held-released:{node_id}",
        node_id=node_id,
        address=address,
        lamports=lamports,
        command="give it back",
    )


def plan_payout(payout: str, lamports: int, *, address: str = OWNERS[0], nonce: int = 0) -> PayoutPlanned:
    return PayoutPlanned(
        id=f"{payout}:planned",
        payout_id=payout,
        address=address,
        lamports=lamports,
        nonce=nonce or _nonce(payout),
    )


def plan_withdrawal(payout: str, lamports: int, *, address: str = ALICE, nonce: int = 0) -> WithdrawalPlanned:
    return WithdrawalPlanned(
        id=f"{payout}:planned",
        payout_id=payout,
        address=address,
        lamports=lamports,
        nonce=nonce or _nonce(payout),
        expires_at_ms=1,
        signature=SIGNATURE,
    )


def cover_loss(name: str, lamports: int, *, address: str = ALICE) -> LossCovered:
    return LossCovered(id=f"covered:{name}", address=address, lamports=lamports, command="I pay")


def take_revenue(payout: str, lamports: int, *, address: str = ALICE, nonce: int = 0) -> RevenueTaken:
    return RevenueTaken(
        id=f"{payout}:planned",
        payout_id=payout,
        address=address,
        lamports=lamports,
        nonce=nonce or _nonce(payout),
        command="take it out",
    )


def replace_platform(new: str) -> PlatformReplaced:
    return PlatformReplaced(id=f"platform:{new}", old=ALICE, new=new, by_old="0x1", by_new="0x2")


def paid(payout: str, *, fee_lamports: int = 0, command: str = "") -> PayoutPaid:
    return PayoutPaid(id=f"{payout}:paid", payout_id=payout, fee_lamports=fee_lamports, command=command)


def refused(payout: str) -> PayoutRefused:
    return PayoutRefused(id=f"{payout}:refused", payout_id=payout)


def _nonce(payout: str) -> int:
    """Return a nonce that grows with the number in a payout's name."""
    digits = re.sub(r"\D", "", payout)
    return 1 + int(digits or 0)
