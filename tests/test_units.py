"""Amounts and sizes are exact, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import InvalidRequest
from azu.units import (
    GIB,
    MAX_LAMPORTS,
    MIB,
    format_bytes,
    hype_from_lamports,
    lamports_from_hype,
    parse_bytes,
)


@given(lamports=st.integers(min_value=-MAX_LAMPORTS, max_value=MAX_LAMPORTS))
def test_lamports_become_hype_and_back_exactly(lamports: int) -> None:
    assert lamports_from_hype(hype_from_lamports(lamports)) == lamports


@pytest.mark.parametrize(
    ("text", "lamports"), [("1", 10**8), ("0.00000001", 1), ("1.25", 125_000_000), ("1e-8", 1)]
)
def test_hype_is_parsed_exactly(text: str, lamports: int) -> None:
    assert lamports_from_hype(text) == lamports


@pytest.mark.parametrize("text", ["", "x", "0.000000001", "NaN", "Infinity", "1,5", "--1"])
def test_a_malformed_amount_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        lamports_from_hype(text)


@pytest.mark.parametrize(
    "text",
    [
        "1000000000.00000001",
        "-1000000001",
        "1e10",
        "1e999999999999999999",
        "1e-999999999999999999",
        "1.0000000000000000000000000001",
        "100000000.00000000000000000000000000001",
        "9" * 5000,
    ],
)
def test_an_amount_is_refused_before_it_would_be_rounded_or_exceeds_all_hype(text: str) -> None:
    with pytest.raises(InvalidRequest, match="10\\^9"):
        lamports_from_hype(text)


def test_all_hype_is_an_amount() -> None:
    assert lamports_from_hype("1000000000.000000000000000000") == MAX_LAMPORTS


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("512MiB", 512 * MIB),
        ("800M", 800 * MIB),
        ("1.5g", 3 * GIB // 2),
        ("7", 7),
        (7, 7),
    ],
)
def test_sizes_are_parsed_in_powers_of_1024(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 apple", "1e9", -1, True])
def test_a_malformed_size_is_refused(text: str | int) -> None:
    with pytest.raises(InvalidRequest):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (MIB, "1.0 MiB"), (1536 * MIB, "1.5 GiB")]
)
def test_sizes_are_shown_in_the_largest_unit_that_fits(size: int, text: str) -> None:
    assert format_bytes(size) == text
