"""A machine reports on itself: its name does nothing to what shows it, its numbers nothing to plans."""

from dataclasses import replace

import pytest

from azu.errors import InvalidRequest
from azu.units import GIB
from tests.builders import node


def test_a_report_has_names_that_anything_may_show() -> None:
    plain = node("n1", name="ada", device="cuda:0")
    hostile = replace(plain, name="ada\x1b[2J\n" + "x" * 100, device="\x9bcpu", payout_address="0x1\u202e")

    shown = hostile.checked(plain.vram_total_bytes)

    assert plain.checked(plain.vram_total_bytes) == plain
    assert shown.name.startswith("ada\\u001b[2J\\nxxx")
    assert len(shown.name) == 64
    assert (shown.device, shown.payout_address) == ("\\u009bcpu", "0x1\\u202e")


@pytest.mark.parametrize(("reported_gib", "counted_gib"), [(1, 1), (2, 2), (1000, 2)])
def test_a_node_has_no_more_memory_than_it_lends(reported_gib: int, counted_gib: int) -> None:
    assert node("n1", reported_gib * GIB).checked(2 * GIB).vram_total_bytes == counted_gib * GIB


@pytest.mark.parametrize(
    "number",
    [
        {"vram_total_bytes": 10**400},
        {"vram_free_bytes": -(2**64)},
        {"vram_used_bytes": 2**64},
        {"memory_bytes_per_s": 0.0},
        {"flops_per_s": float("nan")},
        {"links_s": {"n2": float("inf")}},
    ],
    ids=lambda number: next(iter(number)),
)
def test_a_report_with_numbers_of_no_device_is_refused(number: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        replace(node("n1"), **number).checked(2 * GIB)
