"""A job costs tokens times layers times the price, and never more than its reservation."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.money.pricing import Division, charge, divide, max_charge
from azu.protocol.job import PLATFORM_NODE

COUNTS = st.integers(0, 10**6)


def test_eighty_layers_and_a_hundred_tokens_cost_sixteen_thousand_lamports() -> None:
    assert charge(prompt_tokens=40, completion_tokens=60, num_layers=80, lamports_per_token_layer=2) == 16_000


@pytest.mark.parametrize(
    ("delivered", "ran", "tokens"),
    [(0, 0, 0), (0, 300, 300), (0, 1_001, 1_000), (1, 0, 1_001), (1, 300, 1_001)],
)
def test_before_the_first_token_only_prompt_tokens_that_ran_are_charged(
    delivered: int, ran: int, tokens: int
) -> None:
    assert charge(1_000, delivered, 80, 2, ran) == tokens * 80 * 2


@given(prompt=COUNTS, ran=COUNTS, delivered=COUNTS, undelivered=COUNTS, layers=COUNTS, price=COUNTS)
def test_a_charge_never_exceeds_what_was_reserved(
    prompt: int, ran: int, delivered: int, undelivered: int, layers: int, price: int
) -> None:
    reserved = max_charge(prompt, delivered + max(1, undelivered), layers, price)
    assert 0 <= charge(prompt, delivered, layers, price, ran) <= reserved


A, B, C = (f"0x{digit * 40}" for digit in "abc")


def test_sixteen_thousand_lamports_are_divided_20_to_80() -> None:
    work = {layer: {A if layer < 60 else B: 7} for layer in range(80)}
    assert divide(16_000, 20, work, 80) == Division(3_200, {A: 9_600, B: 3_200})


@pytest.mark.parametrize(
    ("charged", "platform", "worker"),
    [(0, 0, 0), (1, 1, 0), (2, 1, 1), (3, 1, 2), (4, 1, 3), (5, 1, 4), (6, 2, 4)],
)
def test_the_remainder_goes_to_the_platform(charged: int, platform: int, worker: int) -> None:
    assert divide(charged, 20, {0: {A: 1}}, 1) == Division(platform, {A: worker})


def test_each_layer_has_the_same_weight_whatever_its_bytes() -> None:
    assert divide(100, 20, {0: {A: 1}, 1: {B: 10**12}}, 2) == Division(20, {A: 40, B: 40})


def test_within_a_layer_the_activated_bytes_count() -> None:
    assert divide(100, 20, {0: {A: 3, B: 1}}, 1) == Division(20, {A: 60, B: 20})


def test_a_worker_that_died_is_paid_for_the_bytes_it_finished() -> None:
    work = {0: {A: 30, B: 10}, 1: {C: 40}}
    assert divide(1_000, 20, work, 2) == Division(200, {A: 300, B: 100, C: 400})


def test_what_two_workers_do_not_agree_about_is_the_platforms() -> None:
    work = {0: {A: 30, PLATFORM_NODE: 10}, 1: {C: 40}}
    assert divide(1_000, 20, work, 2) == Division(300, {A: 300, C: 400})


def test_a_lamport_left_over_goes_to_the_largest_fraction() -> None:
    # The exact claims are 1 3/7, 2 6/7 and 5 5/7.
    assert divide(10, 0, {0: {A: 1, B: 2, C: 4}}, 1).workers == {A: 1, B: 3, C: 6}


def test_of_equal_fractions_the_lower_address_gets_the_lamport() -> None:
    assert divide(11, 0, {0: {C: 1, B: 1, A: 1}}, 1).workers == {A: 4, B: 4, C: 3}


def test_the_share_of_a_layer_whose_work_is_missing_or_impossible_is_held() -> None:
    work: dict[int, dict[str, int]] = {0: {A: 1}, 1: {}, 2: {A: 0}}
    assert divide(400, 20, work, 4) == Division(80, {A: 80}, 240)
    assert divide(400, 20, {}, 4) == Division(80, {}, 320)
    assert divide(400, 20, {0: {A: -1, B: 2}, 1: {B: 1}}, 2) == Division(80, {B: 160}, 160)
    assert divide(400, 20, {0: {A: 2**63}, 1: {B: 2**63 - 1}}, 2) == Division(80, {B: 160}, 160)


def test_a_division_takes_as_many_steps_as_there_is_work() -> None:
    # Over as many layers this would not come to an end.
    assert divide(400, 20, {0: {A: 1}}, 10**15) == Division(80, {A: 0}, 320)


def test_work_in_layers_that_the_model_lacks_counts_for_nothing() -> None:
    assert divide(100, 20, {0: {A: 1}, 1: {B: 9}, -1: {C: 9}}, 1) == Division(20, {A: 80})


WORK = st.dictionaries(
    st.integers(-1, 12), st.dictionaries(st.sampled_from([A, B, C]), st.integers(-1, 10**13), max_size=3)
)


@given(charged=st.integers(0, 10**17), percent=st.integers(0, 100), work=WORK)
def test_every_division_is_exact_and_fair_to_within_a_lamport(
    charged: int, percent: int, work: dict[int, dict[str, int]]
) -> None:
    division = divide(charged, percent, work, 12)

    assert division.platform_lamports + division.held_lamports + sum(division.workers.values()) == charged
    assert Fraction(charged * percent, 100) <= division.platform_lamports
    assert division.platform_lamports < Fraction(charged * percent, 100) + 1
    assert division.held_lamports >= 0
    pot = Fraction(charged * (100 - percent), 100)
    for payout, lamports in division.workers.items():
        fair = sum(
            (
                pot / 12 * Fraction(layer[payout], sum(layer.values()))
                for index, layer in work.items()
                if 0 <= index < 12 and min(layer.values(), default=0) >= 0 and layer.get(payout)
            ),
            Fraction(),
        )
        assert lamports >= 0
        # One for the remainder among workers, and less than one for that between them and the platform.
        assert abs(lamports - fair) < 2
