"""What each transfer books, and what the rules refuse."""

from copy import deepcopy
from dataclasses import replace
from typing import get_args

import pytest

from azu.errors import AzuError, Conflict, InsufficientBalance, LedgerError, Unauthenticated
from azu.money.chain.rows import NONCE_WINDOW_MS
from azu.money.ledger.posting import _RULES, apply_once
from azu.money.ledger.state import KEPT_MS, BooksState, decode_state, encode_state
from azu.money.ledger.transfers import (
    CHAIN,
    HELD,
    PLATFORM,
    PLATFORM_PAYING,
    SUSPENSE,
    JournalSealed,
    LossAccepted,
    LossNoted,
    Transfer,
    WriterOpened,
    node_held,
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

DAY_MS = 86_400_000
EARNED = worker_earned(OWNERS[0])


def after(*transfers: Transfer, at_ms: int = 1, state: BooksState | None = None) -> BooksState:
    """Return the books after these transfers; each has to be accepted. Alice has a key from the start."""
    if state is None:
        state = BooksState()
        apply_once(state, moves.open_key(), at_ms)
    for transfer in transfers:
        apply_once(state, transfer, at_ms)
    return state


def refused(state: BooksState, transfer: Transfer, at_ms: int = 1) -> AzuError:
    """Return the error of a transfer that is refused, and has changed nothing."""
    was = deepcopy(state)
    with pytest.raises(AzuError) as raised:
        apply_once(state, transfer, at_ms)
    assert state == was
    return raised.value


def test_every_kind_of_transfer_has_a_rule() -> None:
    assert set(_RULES) == set(get_args(Transfer))


def test_a_deposit_is_credited_to_its_sender() -> None:
    assert after(moves.deposit(500)).balances == {CHAIN: -500, user_available(ALICE): 500}


def test_a_reservation_takes_from_the_available_balance() -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 500))
    assert state.balances == {CHAIN: -500, user_reserved(ALICE): 500}
    assert state.spent == {moves.key_of(ALICE): 500}


def test_a_settlement_pays_platform_and_workers_and_returns_the_rest() -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300), moves.settle("job-1", 100, w0=50, w1=30))
    assert state.balances == {
        CHAIN: -500,
        user_available(ALICE): 400,
        PLATFORM: 20,
        worker_earned(OWNERS[0]): 50,
        worker_earned(OWNERS[1]): 30,
    }
    assert state.reservations == {}
    assert state.spent == {moves.key_of(ALICE): 100}


@pytest.mark.parametrize("end", [moves.settle("job-1", 0), moves.release("job-1"), moves.expire("job-1")])
def test_a_reservation_that_ends_without_a_charge_is_returned_in_full(end: Transfer) -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300), end)
    assert state.balances == {CHAIN: -500, user_available(ALICE): 500}
    assert state.spent == {}


@pytest.mark.parametrize("too_much", [moves.reserve("job-2", 201), moves.plan_withdrawal("p1", 201)])
def test_a_user_cannot_use_more_than_is_available(too_much: Transfer) -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300))
    assert isinstance(refused(state, too_much), InsufficientBalance)


def test_a_charge_is_at_most_what_is_reserved_and_what_the_tokens_cost() -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300))
    assert refused(state, moves.settle("job-1", 301)).code == "ledger_error"
    priced = moves.reserve("job-2", 7)
    dear = replace(priced, num_layers=4, lamports_per_token_layer=2, prompt_tokens=3)
    assert dear.lamports == 80
    state = after(dear, state=state)
    nine_tokens = replace(moves.settle("job-2", 9 * 8 + 1), completion_tokens=9)
    assert "72 are the most" in refused(state, nine_tokens).message


@pytest.mark.parametrize("end", [moves.settle("job-1", 5), moves.release("job-1"), moves.expire("job-1")])
def test_a_reservation_ends_once(end: Transfer) -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300), moves.settle("job-1", 5))
    assert refused(state, end).code == "unknown_hold"


def test_a_job_is_reserved_for_under_one_id() -> None:
    state = after(moves.deposit(500), moves.reserve("job-1", 300))
    assert refused(state, moves.reserve("job-1", 1)).code == "hold_exists"
    other = replace(moves.reserve("job-2", 1), id="another")
    assert "has to be reserve:job-2" in refused(state, other).message


def test_a_key_spends_its_own_addresss_money_until_it_expires_or_is_revoked() -> None:
    state = after(moves.deposit(500), moves.open_key(BOB, expires_at_ms=50), moves.deposit(9, address=BOB))
    assert refused(state, moves.reserve("j", 1, key_id=moves.key_of(BOB))).code == "unknown_key"
    assert refused(state, moves.reserve("j", 1, key_id="key-none")).code == "unknown_key"
    assert isinstance(refused(state, moves.reserve("j", 1, address=BOB), at_ms=50), Unauthenticated)
    state = after(moves.revoke_key(moves.key_of(ALICE)), state=state)
    assert refused(state, moves.reserve("j", 1)).code == "unknown_key"
    assert refused(state, moves.revoke_key(moves.key_of(ALICE))).code == "unknown_key"


def test_a_key_of_a_limit_counts_open_jobs_in_full_and_ended_ones_as_charged() -> None:
    key = moves.open_key(key_id="k", limit=100)
    state = after(moves.deposit(500), key, moves.reserve("job-1", 80, key_id="k"))
    assert refused(state, moves.reserve("job-2", 21, key_id="k")).code == "spend_limit_reached"
    state = after(moves.settle("job-1", 30), moves.reserve("job-2", 70, key_id="k"), state=state)
    assert state.spent == {"k": 100}
    assert refused(state, moves.reserve("job-3", 1, key_id="k")).code == "spend_limit_reached"


def test_a_key_is_kept_without_the_text_that_was_signed() -> None:
    state = after()
    assert state.keys[moves.key_of(ALICE)].text == state.keys[moves.key_of(ALICE)].signature == ""
    assert refused(state, moves.open_key()).code == "key_exists"


def test_a_job_whose_key_is_revoked_ends_as_any_other() -> None:
    state = after(
        moves.deposit(500), moves.reserve("job-1", 300), moves.revoke_key(moves.key_of(ALICE)),
        moves.settle("job-1", 100, w0=80),
    )  # fmt: skip
    assert state.balance(user_available(ALICE)) == 400
    assert state.spent == {}


def earned(lamports: int, maturity_ms: int = 0) -> tuple[Transfer, ...]:
    """Transfers that leave exactly this much on the first worker's account, which is claimed."""
    return (
        moves.deposit(lamports),
        moves.reserve("j", lamports),
        moves.settle("j", lamports, w0=lamports, maturity_ms=maturity_ms),
        moves.claim(),
    )


def test_a_payout_moves_from_earned_through_paying_to_paid() -> None:
    planned = (*earned(100), moves.plan_payout("p1", 70))
    assert after(*planned).balances == {CHAIN: -100, EARNED: 30, worker_paying(OWNERS[0]): 70}
    assert after(*planned, moves.paid("p1", fee_lamports=2)).balances == {
        CHAIN: -98,
        EARNED: 30,
        worker_paid(OWNERS[0]): 68,
    }


def test_a_refused_payout_is_earned_again() -> None:
    state = after(*earned(100), moves.plan_payout("p1", 70), moves.refused("p1"))
    assert state.balances == {CHAIN: -100, EARNED: 100}
    assert state.payouts == {}
    assert refused(state, moves.paid("p1")).code == "unknown_hold"


def test_a_withdrawal_goes_back_to_the_chain_or_to_the_user() -> None:
    planned = (moves.deposit(100), moves.plan_withdrawal("p1", 70))
    assert after(*planned).balances == {CHAIN: -100, user_available(ALICE): 30, user_withdrawing(ALICE): 70}
    assert after(*planned, moves.paid("p1")).balances == {CHAIN: -30, user_available(ALICE): 30}
    assert after(*planned, moves.refused("p1")).balances == {CHAIN: -100, user_available(ALICE): 100}


def test_revenue_is_taken_out_as_a_payout_of_the_platforms_own() -> None:
    taken = (
        moves.deposit(100),
        moves.reserve("j", 100),
        moves.settle("j", 100),
        moves.take_revenue("p1", 60),
    )
    assert after(*taken).balances == {CHAIN: -100, PLATFORM: 40, PLATFORM_PAYING: 60}
    assert after(*taken, moves.paid("p1")).balances == {CHAIN: -40, PLATFORM: 40}
    assert after(*taken, moves.refused("p1")).balances == {CHAIN: -100, PLATFORM: 100}
    assert refused(after(*taken), moves.take_revenue("p2", 41)).code == "not_matured"


def test_only_a_claimed_address_is_paid() -> None:
    state = after(*earned(100)[:3])
    assert refused(state, moves.plan_payout("p1", 70)).code == "unclaimed"


def test_a_nonce_is_used_for_one_payout_for_ever() -> None:
    first, second = NONCE_WINDOW_MS + 7, NONCE_WINDOW_MS + 8
    state = after(*earned(100), moves.deposit(9, tx_hash="0x02"), moves.plan_payout("p1", 10, nonce=first))
    assert state.nonces == {str(first): "p1"}
    for nonce in (first, 7):
        assert refused(state, moves.plan_withdrawal("p2", 1, nonce=nonce)).code == "nonce_used"
    # Within a window nonces come in any order.
    after(moves.plan_withdrawal("p2", 1, nonce=8), state=deepcopy(state))
    state = after(moves.refused("p1"), state=state)
    assert refused(state, moves.plan_payout("p3", 1, nonce=first)).code == "nonce_used"
    # A clock that is ahead has no name forgotten; a nonce follows the chain's time.
    state = after(moves.plan_payout("p9", 1, nonce=second), at_ms=9 * KEPT_MS, state=state)
    assert state.nonces == {str(first): "p1", str(second): "p9"}
    late = second + KEPT_MS
    state = after(moves.plan_payout("p3", 1, nonce=late), state=state)
    assert state.nonces == {str(second): "p9", str(late): "p3"}
    assert refused(state, moves.plan_payout("p4", 1, nonce=first), at_ms=9 + KEPT_MS).code == "nonce_used"


def test_a_fee_larger_than_the_payout_is_refused() -> None:
    state = after(moves.deposit(100), moves.plan_withdrawal("p1", 10))
    assert "fee" in refused(state, moves.paid("p1", fee_lamports=11)).message


def test_what_a_job_paid_matures_before_it_can_be_taken() -> None:
    state = after(*earned(100, DAY_MS))
    assert (state.balance(EARNED), state.free(EARNED)) == (100, 0)
    assert refused(state, moves.plan_payout("p1", 1), at_ms=DAY_MS).code == "not_matured"
    state = after(moves.plan_payout("p1", 100), at_ms=1 + DAY_MS, state=state)
    assert (state.unmatured, state.locked) == ({}, {})


def test_the_platforms_part_matures_as_the_others() -> None:
    state = after(moves.deposit(100), moves.reserve("j", 100), moves.settle("j", 100, maturity_ms=DAY_MS))
    assert refused(state, moves.take_revenue("p1", 1)).code == "not_matured"
    assert after(moves.take_revenue("p1", 100), at_ms=1 + DAY_MS, state=state).balance(PLATFORM) == 0


def test_all_that_a_job_paid_is_reversed_to_its_payer_before_it_matures() -> None:
    history = (
        moves.deposit(500),
        moves.reserve("j", 300),
        moves.settle("j", 100, w0=50, w1=20, held={"node-9": 10}, maturity_ms=DAY_MS),
    )
    state = after(*history, moves.reverse("j"))
    assert state.balances == {CHAIN: -500, user_available(ALICE): 500}
    assert (state.unmatured, state.locked) == ({}, {})
    assert refused(state, moves.reverse("j")).code == "matured"
    assert refused(after(*history), moves.reverse("j"), at_ms=1 + DAY_MS).code == "matured"


def test_a_disputed_jobs_money_is_held_until_an_admin_decides_however_late() -> None:
    history = (
        moves.deposit(100), moves.reserve("j", 100), moves.settle("j", 100, w0=80, maturity_ms=DAY_MS),
        moves.claim(), moves.dispute("j"),
    )  # fmt: skip
    state = after(*history)
    assert state.balances == {CHAIN: -100, HELD: 100}
    assert state.locked == {}
    assert refused(state, moves.dispute("j")).code == "matured"
    late = 9 * DAY_MS
    assert after(moves.reverse("j"), at_ms=late, state=after(*history)).balances == {
        CHAIN: -100,
        user_available(ALICE): 100,
    }
    dismissed = after(moves.dismiss("j"), at_ms=late, state=after(*history))
    assert dismissed.balances == {CHAIN: -100, PLATFORM: 20, EARNED: 80}
    assert after(moves.plan_payout("p1", 80), at_ms=late, state=dismissed).disputes == {}
    assert refused(dismissed, moves.dismiss("j"), at_ms=late).code == "matured"


def test_nothing_is_held_of_a_job_without_a_maturity() -> None:
    state = after(*earned(100))
    assert refused(state, moves.dispute("j")).code == "matured"
    assert refused(state, moves.dismiss("j")).code == "matured"


def test_held_money_goes_to_the_enrolled_nodes_address_or_as_an_admin_says() -> None:
    held = (moves.deposit(90), moves.reserve("j", 90), moves.settle("j", 90, held={"n": 90}))
    state = after(*held)
    assert state.balances == {CHAIN: -90, node_held("n"): 90}
    assert "not enrolled" in refused(state, moves.pay_held("n", 90)).message
    state = after(moves.enrol("n", OWNERS[1]), state=state)
    assert "not enrolled" in refused(state, moves.pay_held("n", 90)).message
    state = after(
        moves.pay_held("n", 50, address=OWNERS[1]), moves.release_held("n", 40, address=BOB), state=state
    )
    assert state.balances == {CHAIN: -90, worker_earned(OWNERS[1]): 50, user_available(BOB): 40}
    assert refused(state, moves.pay_held("n", 1, address=OWNERS[1], number=2)).code == "not_matured"


def test_held_money_that_may_be_reversed_stays_where_it_is() -> None:
    history = (
        moves.deposit(90),
        moves.reserve("j", 90),
        moves.settle("j", 90, held={"n": 90}, maturity_ms=9),
    )
    state = after(*history, moves.enrol("n"))
    assert refused(state, moves.pay_held("n", 1)).code == "not_matured"
    assert refused(state, moves.release_held("n", 1)).code == "not_matured"
    assert after(moves.pay_held("n", 90), at_ms=10, state=state).balance(EARNED) == 90


def test_a_node_changes_only_with_its_own_key() -> None:
    state = after(moves.enrol("n"), moves.enrol("n", OWNERS[1], number=2))
    assert state.nodes["n"].payout == OWNERS[1]
    assert refused(state, moves.enrol("n", BOB, key_digest="other", number=3)).code == "node_taken"
    state = after(moves.remove_node("n"), state=state)
    assert state.nodes == {}
    assert refused(state, moves.remove_node("n", number=2)).code == "unknown_node"
    assert refused(state, moves.enrol("n", number=4)).code == "node_removed"


def test_a_suspended_row_belongs_to_no_user_until_it_is_credited() -> None:
    state = after(moves.suspend("r1", 70), moves.suspend("r2", 5))
    assert state.balances == {CHAIN: -75, SUSPENSE: 75}
    assert "no row r1 of 69" in refused(state, moves.credit_suspense("r1", 69)).message
    state = after(moves.credit_suspense("r1", 70, address=BOB), state=state)
    assert state.balances == {CHAIN: -75, SUSPENSE: 5, user_available(BOB): 70}
    assert set(state.suspense) == {"r2"}
    assert "no row r1" in refused(state, moves.credit_suspense("r1", 70)).message


def test_money_that_left_without_a_payout_is_its_receivers_and_then_the_platforms_debt() -> None:
    worker = OWNERS[0]
    history = (*earned(100), moves.deposit(30, address=worker, tx_hash="0x02"))
    state = after(*history, moves.unknown_out("r1", 50))
    assert state.balances == {CHAIN: -80, EARNED: 80}
    state = after(moves.unknown_out("r2", 100), state=state)
    assert state.balances == {CHAIN: 20, PLATFORM: -20}
    assert after(moves.deposit(100, tx_hash="0x03"), state=state).balance(CHAIN) == -80
    state = after(moves.reserve("k", 60), moves.settle("k", 60, w0=48), state=state)
    assert state.balance(PLATFORM) == -8
    assert refused(state, moves.take_revenue("p9", 1)).code == "not_matured"


def test_money_that_may_be_reversed_is_not_taken_for_what_left_without_a_payout() -> None:
    state = after(*earned(100, DAY_MS), moves.unknown_out("r1", 50))
    assert state.balances == {CHAIN: -50, EARNED: 100, PLATFORM: -50}
    assert after(moves.reverse("j"), state=state).balance(user_available(ALICE)) == 100


def test_a_reversal_gives_the_payer_all_though_the_platform_lost_its_part() -> None:
    history = (moves.deposit(100), moves.reserve("j", 100), moves.settle("j", 100, w0=80, maturity_ms=9))
    state = after(*history, moves.unknown_out("r1", 30, address=BOB))
    assert state.balance(PLATFORM) == -10
    assert after(moves.reverse("j"), state=state).balances == {
        CHAIN: -70,
        PLATFORM: -30,
        user_available(ALICE): 100,
    }


def test_credits_are_kept_by_their_entry_for_thirty_days_and_their_sum_for_ever() -> None:
    first = moves.deposit(7, at_ms=1_000)
    state = after(first, moves.suspend("r1", 5, at_ms=2_000), at_ms=2_000)
    assert list(state.credits) == ["2", "3"], "the first entry is of the key"
    # A clock that is ahead has none forgotten: only the chain's time counts.
    state = after(moves.claim(), at_ms=9 * KEPT_MS, state=state)
    state = after(moves.deposit(1, tx_hash="0x02", at_ms=1_000 + KEPT_MS), state=state)
    assert state.credits["2"] == first
    state = after(moves.suspend("r2", 1, at_ms=1_001 + KEPT_MS), state=state)
    assert list(state.credits) == ["3", "5", "6"]
    assert (state.facts["credited"], state.facts["number"]) == (14, 6)


def test_a_loss_stands_until_its_size_is_accepted() -> None:
    def accept(num_entries: int) -> LossAccepted:
        return LossAccepted(id=f"accepted:{num_entries}", num_entries=num_entries)

    state = after()
    assert isinstance(refused(state, accept(1)), Conflict)
    state = after(*(LossNoted(id=f"loss:{n}", num_entries=n) for n in (2, 3)), state=state)
    assert "accept 5" in refused(state, accept(2)).message
    assert "lost" not in after(accept(5), state=state).facts


def test_entries_about_the_journal_itself_move_nothing() -> None:
    state = after(WriterOpened(id="w"), JournalSealed(id="s", through=9, sha256="f" * 64))
    assert state.balances == {}
    assert state.seals == {"9": "f" * 64}


def test_expired_reservations_come_in_the_order_of_their_times() -> None:
    state = after(
        moves.deposit(100),
        *(moves.reserve(f"job-{at}", 1, expires_at_ms=at) for at in (30, 10, 20, 40)),
        moves.release("job-10"),
    )
    assert [hold.job_id for hold in state.expired(30)] == ["job-20", "job-30"]


def test_balances_have_a_bound() -> None:
    state = after(*(moves.deposit(MAX_LAMPORTS, tx_hash=f"0x{number:02x}") for number in range(92)))
    assert isinstance(refused(state, moves.deposit(MAX_LAMPORTS, tx_hash="0xff")), LedgerError)


def test_a_clock_that_goes_back_a_little_stands_still() -> None:
    state = after(*earned(100, DAY_MS), at_ms=60_005)
    apply_once(state, moves.claim(BOB), 5)
    assert state.facts["at_ms"] == 60_005


def test_after_a_clock_that_was_ahead_is_back_nothing_waits_longer_than_it_should() -> None:
    before, ahead = 10 * DAY_MS, 40 * DAY_MS
    bob = moves.open_key(BOB, expires_at_ms=before + DAY_MS), moves.deposit(9, address=BOB)
    state = after(*bob, *earned(100, DAY_MS), at_ms=before)
    wrong = (moves.deposit(200, tx_hash="0x05"), moves.reserve("j2", 100), moves.settle("j2", 100))
    hold = moves.reserve("j3", 50, expires_at_ms=ahead + 600_000)
    state = after(*wrong[:2], replace(wrong[2], maturity_ms=DAY_MS), hold, at_ms=ahead, state=state)
    assert isinstance(refused(state, moves.reserve("j4", 1, address=BOB), at_ms=ahead), Unauthenticated)

    state = after(moves.reserve("j4", 1, address=BOB), at_ms=before + 1, state=state)

    assert state.unmatured["j2"].matures_at_ms == before + 1 + DAY_MS
    assert "j3" in [one.job_id for one in state.expired(before + 600_001)]
    state = after(moves.plan_payout("p", 1), at_ms=before + 1 + DAY_MS, state=state)
    assert "j2" not in state.unmatured


def test_a_fee_that_is_set_aside_for_long_has_no_job_wait_longer_after_a_wrong_clock() -> None:
    before, ahead = 10 * DAY_MS, 40 * DAY_MS
    holds = (
        moves.reserve("j1", 1, expires_at_ms=before + 600_000),
        moves.reserve("fetch-1", 1, expires_at_ms=before + DAY_MS),
    )
    state = after(moves.deposit(9), *holds, at_ms=before)
    holds = (
        moves.reserve("j2", 1, expires_at_ms=ahead + 600_000),
        moves.reserve("fetch-2", 1, expires_at_ms=ahead + DAY_MS),
    )
    state = after(*holds, at_ms=ahead, state=state)
    state = after(moves.claim(BOB), at_ms=before + 1, state=state)
    open_ms = {one.job_id: one.expires_at_ms - before for one in state.reservations.values()}
    assert open_ms == {"j1": 600_000, "fetch-1": DAY_MS, "j2": 600_001, "fetch-2": DAY_MS + 1}


def test_what_is_given_back_counts_for_the_day_on_which_it_was_set_aside() -> None:
    def today(state: BooksState, at_ms: int) -> int:
        return state.in_days(moves.key_of(ALICE), at_ms)

    state = after(moves.deposit(999), moves.reserve("j1", 300), moves.reserve("j2", 20), at_ms=1)
    state = after(moves.release("j2"), at_ms=2, state=state)
    assert today(state, 2) == 300
    state = after(moves.reserve("j3", 200), moves.release("j1"), at_ms=DAY_MS, state=state)
    assert today(state, DAY_MS) == 200
    state = after(moves.settle("j3", 50), at_ms=DAY_MS + 1, state=state)
    assert today(state, DAY_MS) == 50
    assert not [row for row in state.by_day if "/j" in row]


def test_what_a_clock_that_was_ahead_counted_for_days_to_come_is_forgotten() -> None:
    before, ahead = 10 * DAY_MS, 40 * DAY_MS
    state = after(*earned(100, DAY_MS), at_ms=before)
    spent = dict(state.by_day)
    assert spent
    moved = moves.deposit(200, tx_hash="0x05"), moves.reserve("j2", 100), moves.settle("j2", 100)
    state = after(*moved, at_ms=ahead, state=state)
    state = after(moves.deposit(1, tx_hash="0x06"), at_ms=before, state=state)
    assert all(int(row.partition("/")[0]) <= 10 for row in state.by_day)


def test_a_state_is_the_same_after_encoding_and_decoding() -> None:
    state = after(
        *earned(100, DAY_MS), moves.suspend("r1", 70), moves.enrol("n"),
        moves.deposit(50, tx_hash="0x09"), moves.reserve("job-9", 20), moves.plan_withdrawal("p1", 10),
    )  # fmt: skip
    assert decode_state(encode_state(state)) == state
    with pytest.raises(LedgerError):
        decode_state(b'{"balances": {"chain": "1"}}')
