"""What a transfer does: the legs that it books and the hold that it opens or ends."""

from dataclasses import dataclass
from typing import assert_never

from azu.errors import LedgerError
from azu.ledger.accounts import CHAIN, PLATFORM, Account, user_available, worker_earned, worker_paid
from azu.ledger.holds import Hold, Payout, Reservation, ended, payout_name, reservation_name
from azu.ledger.transfers import (
    Deposit,
    Expire,
    PayoutPaid,
    PayoutPlanned,
    PayoutRefused,
    Release,
    Reserve,
    Settle,
    Transfer,
    WithdrawalPlanned,
)


@dataclass(frozen=True, slots=True)
class Leg:
    """One account's change: lamports above zero are credited, below zero debited."""

    account: Account
    lamports: int


@dataclass(frozen=True, slots=True)
class Posting:
    """A transfer worked out against the hold it found: legs of distinct accounts that sum to zero.

    `hold_name` is empty for transfers without a hold; else the hold becomes `after`, if it still is what
    it was when the posting was worked out.
    """

    transfer: Transfer
    legs: tuple[Leg, ...]
    hold_name: str = ""
    after: Hold | None = None

    def __post_init__(self) -> None:
        assert sum(leg.lamports for leg in self.legs) == 0
        assert len({leg.account for leg in self.legs}) == len(self.legs)


def hold_name(transfer: Transfer) -> str:
    """Return the name of the hold that the transfer opens or ends; empty if it does neither."""
    match transfer:
        case Deposit():
            return ""
        case Reserve() | Settle() | Release() | Expire():
            return reservation_name(transfer.job_id)
        case PayoutPlanned() | WithdrawalPlanned() | PayoutPaid() | PayoutRefused():
            return payout_name(transfer.payout_id)
        case _ as never:
            assert_never(never)


def post(transfer: Transfer, found: Hold | None) -> Posting:
    """Work out a transfer against the hold that now stands under its name.

    Raises LedgerError, with the code `unknown_hold` or `hold_ended` where there is nothing left to end.
    """
    match transfer:
        case Deposit():
            arrived = transfer.lamports
            return Posting(transfer, _legs({CHAIN: -arrived, user_available(transfer.address): arrived}))
        case Reserve() | PayoutPlanned() | WithdrawalPlanned():
            return _open(transfer, found)
        case Settle():
            return _settle(transfer, found)
        case PayoutPaid():
            return _paid(transfer, found)
        case Release() | Expire() | PayoutRefused():
            hold = _still_open(transfer, found)
            return _end(transfer, hold, {hold.source: hold.lamports})
        case _ as never:
            assert_never(never)


def _open(transfer: Reserve | PayoutPlanned | WithdrawalPlanned, found: Hold | None) -> Posting:
    name = hold_name(transfer)
    if found is not None:
        raise LedgerError(f"{transfer.id}: {name} was opened before", code="hold_exists")
    hold = _new_hold(transfer)
    legs = _legs({hold.source: -hold.lamports, hold.account: hold.lamports})
    return Posting(transfer, legs, name, hold)


def _new_hold(transfer: Reserve | PayoutPlanned | WithdrawalPlanned) -> Hold:
    if isinstance(transfer, Reserve):
        return Reservation(
            job_id=transfer.job_id,
            address=transfer.address,
            lamports=transfer.lamports,
            expires_at_ms=transfer.expires_at_ms,
        )
    return Payout(
        payout_id=transfer.payout_id,
        address=transfer.address,
        lamports=transfer.lamports,
        payee="worker" if isinstance(transfer, PayoutPlanned) else "user",
    )


def _settle(transfer: Settle, found: Hold | None) -> Posting:
    hold = _still_open(transfer, found)
    if transfer.charged_lamports > hold.lamports:
        raise LedgerError(
            f"{transfer.id} charges {transfer.charged_lamports} of {hold.lamports} reserved lamports"
        )
    return _end(
        transfer,
        hold,
        {
            PLATFORM: transfer.platform_lamports,
            **{worker_earned(payout): lamports for payout, lamports in transfer.shares.items()},
            hold.source: hold.lamports - transfer.charged_lamports,
        },
    )


def _paid(transfer: PayoutPaid, found: Hold | None) -> Posting:
    hold = _still_open(transfer, found)
    if transfer.fee_lamports > hold.lamports:
        raise LedgerError(f"{transfer.id}: a fee of {transfer.fee_lamports} on {hold.lamports} lamports")
    assert isinstance(hold, Payout)
    if hold.payee == "user":
        return _end(transfer, hold, {CHAIN: hold.lamports})
    arrived = hold.lamports - transfer.fee_lamports
    return _end(transfer, hold, {worker_paid(hold.address): arrived, CHAIN: transfer.fee_lamports})


def _still_open(transfer: Transfer, found: Hold | None) -> Hold:
    if found is None:
        raise LedgerError(f"{transfer.id}: there is no {hold_name(transfer)}", code="unknown_hold")
    if found.ended_by is not None:
        raise LedgerError(
            f"{transfer.id}: {hold_name(transfer)} was ended by {found.ended_by}", code="hold_ended"
        )
    return found


def _end(transfer: Transfer, hold: Hold, credits_: dict[Account, int]) -> Posting:
    legs = _legs({hold.account: -hold.lamports, **credits_})
    return Posting(transfer, legs, hold_name(transfer), ended(hold, transfer.id))


def _legs(changes: dict[Account, int]) -> tuple[Leg, ...]:
    return tuple(Leg(account, lamports) for account, lamports in changes.items() if lamports)
