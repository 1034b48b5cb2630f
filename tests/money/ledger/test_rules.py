"""What each transfer books, and what the rules refuse."""

from copy import deepcopy

import pytest

from azu.errors import InsufficientBalance, LedgerError, TransferConflict
from azu.money.ledger.rules import LedgerState, apply
from azu.money.ledger.transfers import (
    CHAIN,
    PLATFORM,
    Reserve,
    Transfer,
    user_available,
    user_reserved,
    user_withdrawing,
    worker_earned,
    worker_paid,
    worker_paying,
)
from azu.units import MAX_LAMPORTS
from tests.builders import ALICE, BOB, OWNERS
from tests.money.ledger import moves


def after(*transfers: Transfer) -> LedgerState:
    """Return the state after these transfers; each has to be accepted."""
    state = LedgerState()
    for transfer in transfers:
        state, _ = apply(state, transfer)
    return state


def balances(state: LedgerState) -> dict[str, int]:
    return {account: lamports for account, lamports in state.balances.items() if lamports}


def test_a_deposit_is_credited_to_its_sender() -> None:
    assert balances(after(moves.deposit(500))) == {CHAIN: -500, user_available(ALICE): 500}


def test_a_reservation_takes_from_the_available_balance() -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 500))
    assert balances(state) == {CHAIN: -500, user_reserved(ALICE): 500}


def test_a_settlement_pays_platform_and_workers_and_returns_the_rest() -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300), moves.settle("job-1", 100, w0=50, w1=30))
    assert balances(state) == {
        CHAIN: -500,
        user_available(ALICE): 400,
        PLATFORM: 20,
        worker_earned(OWNERS[0]): 50,
        worker_earned(OWNERS[1]): 30,
    }


@pytest.mark.parametrize("end", [moves.settle("job-1", 0), moves.release("job-1"), moves.expire("job-1")])
def test_a_reservation_that_ends_without_a_charge_is_returned_in_full(end: Transfer) -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300), end)
    assert balances(state) == {CHAIN: -500, user_available(ALICE): 500}


def earned(lamports: int) -> tuple[Transfer, ...]:
    """Transfers that leave exactly this much on the first worker's account."""
    return (moves.deposit(lamports), moves.reserve("j", lamports), moves.settle("j", lamports, w0=lamports))


def test_a_payout_moves_from_earned_through_paying_to_paid() -> None:
    planned = (*earned(100), moves.plan_payout("p1", 70))
    assert balances(after(*planned)) == {
        CHAIN: -100,
        worker_earned(OWNERS[0]): 30,
        worker_paying(OWNERS[0]): 70,
    }
    assert balances(after(*planned, moves.paid("p1", fee_lamports=2))) == {
        CHAIN: -98,
        worker_earned(OWNERS[0]): 30,
        worker_paid(OWNERS[0]): 68,
    }


def test_a_refused_payout_is_earned_again() -> None:
    state = after(*earned(100), moves.plan_payout("p1", 70), moves.refused("p1"))
    assert balances(state) == {CHAIN: -100, worker_earned(OWNERS[0]): 100}


def test_a_withdrawal_goes_back_to_the_chain_or_to_the_user() -> None:
    planned = (moves.deposit(100), moves.plan_withdrawal("p1", 70))
    assert balances(after(*planned)) == {CHAIN: -100, user_available(ALICE): 30, user_withdrawing(ALICE): 70}
    assert balances(after(*planned, moves.paid("p1"))) == {CHAIN: -30, user_available(ALICE): 30}
    assert balances(after(*planned, moves.refused("p1"))) == {CHAIN: -100, user_available(ALICE): 100}


def test_a_repeated_transfer_returns_its_first_result() -> None:
    history: list[Transfer] = [
        moves.deposit(500),
        moves.reserve("job-1", 300),
        moves.settle("job-1", 100, w0=80),
    ]
    state = after(*history, moves.deposit(1, tx_hash="0x02"))
    for number, transfer in enumerate(history, start=1):
        again, result = apply(state, transfer)
        assert again is state
        assert result.repeated
        assert result.entry.number == number
        assert result.entry.transfer == transfer


@pytest.mark.parametrize(
    "other",
    [
        moves.deposit(501),
        moves.deposit(500, address=BOB),
        moves.reserve("job-1", 301),
        moves.settle("job-1", 100, w0=79),
        moves.settle("job-1", 100, w1=80),
    ],
)
def test_an_id_used_again_for_another_transfer_is_a_conflict(other: Transfer) -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300), moves.settle("job-1", 100, w0=80))
    with pytest.raises(TransferConflict):
        apply(state, other)


@pytest.mark.parametrize("too_much", [moves.reserve("job-2", 201), moves.plan_withdrawal("p1", 201)])
def test_a_user_cannot_use_more_than_is_available(too_much: Transfer) -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300))
    with pytest.raises(InsufficientBalance):
        apply(state, too_much)


def test_a_user_without_an_account_has_nothing_to_reserve() -> None:
    with pytest.raises(InsufficientBalance):
        apply(LedgerState(), moves.reserve("job-1", 1))


@pytest.mark.parametrize("end", [moves.settle("job-1", 0), moves.release("job-1"), moves.expire("job-1")])
@pytest.mark.parametrize("first", [moves.settle("job-1", 5), moves.release("job-1"), moves.expire("job-1")])
def test_a_reservation_ends_once(first: Transfer, end: Transfer) -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300), first)
    if end.id == first.id and end != first:
        with pytest.raises(TransferConflict):
            apply(state, end)
    elif end == first:
        assert apply(state, end)[1].repeated
    else:
        with pytest.raises(LedgerError) as raised:
            apply(state, end)
        assert raised.value.code == "hold_ended"


@pytest.mark.parametrize(
    ("transfer", "code"),
    [
        (moves.settle("unknown", 0), "unknown_hold"),
        (moves.release("unknown"), "unknown_hold"),
        (moves.paid("unknown"), "unknown_hold"),
        (moves.refused("done"), "hold_ended"),
        (moves.settle("job-1", 301), "ledger_error"),
        (moves.plan_payout("p2", 1), "ledger_error"),
    ],
)
def test_a_transfer_against_the_rules_is_a_ledger_error(transfer: Transfer, code: str) -> None:
    history = (moves.deposit(500), moves.reserve("job-1", 300), moves.plan_withdrawal("done", 10))
    state = after(*history, moves.paid("done"))
    with pytest.raises(LedgerError) as raised:
        apply(state, transfer)
    assert raised.value.code == code


@pytest.mark.parametrize("ended", [False, True])
def test_a_job_is_reserved_for_once_whatever_the_transfers_id(ended: bool) -> None:
    history: list[Transfer] = [moves.deposit(500), moves.reserve("job-1", 300)]
    state = after(*history, *([moves.release("job-1")] if ended else []))
    second = Reserve(id="another", address=ALICE, job_id="job-1", lamports=1, expires_at_ms=1)
    with pytest.raises(LedgerError) as raised:
        apply(state, second)
    assert raised.value.code == "hold_exists"


def test_a_fee_larger_than_the_payout_is_refused() -> None:
    state = after(moves.deposit(100), moves.plan_withdrawal("p1", 10))
    with pytest.raises(LedgerError):
        apply(state, moves.paid("p1", fee_lamports=11))


def test_balances_go_up_to_the_range_of_a_redis_counter() -> None:
    state = LedgerState()
    for number in range(92):
        state, _ = apply(state, moves.deposit(MAX_LAMPORTS, tx_hash=f"0x{number:02x}"))
    with pytest.raises(LedgerError):
        apply(state, moves.deposit(MAX_LAMPORTS, tx_hash="0xff"))


def test_a_state_is_never_changed() -> None:
    before = after(moves.deposit(500))
    was = deepcopy(before)
    apply(before, moves.reserve("job-1", 300))
    with pytest.raises(InsufficientBalance):
        apply(before, moves.reserve("job-1", 501))
    assert before == was
