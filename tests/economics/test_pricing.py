"""A job costs tokens times layers times the price, and never more than was reserved for it."""

from hypothesis import given
from hypothesis import strategies as st

from azu.economics.pricing import charge, max_charge

COUNTS = st.integers(0, 10**6)


def test_eighty_layers_and_a_hundred_tokens_cost_sixteen_thousand_lamports() -> None:
    assert charge(prompt_tokens=40, completion_tokens=60, num_layers=80, lamports_per_token_layer=2) == 16_000


def test_nothing_is_charged_before_the_first_token() -> None:
    assert charge(prompt_tokens=1_000, completion_tokens=0, num_layers=80, lamports_per_token_layer=2) == 0


@given(prompt=COUNTS, delivered=COUNTS, undelivered=COUNTS, layers=COUNTS, price=COUNTS)
def test_a_charge_never_exceeds_what_was_reserved(
    prompt: int, delivered: int, undelivered: int, layers: int, price: int
) -> None:
    reserved = max_charge(prompt, delivered + undelivered, layers, price)
    assert 0 <= charge(prompt, delivered, layers, price) <= reserved
