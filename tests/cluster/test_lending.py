"""A node lends when and as far as its owner allows."""

from datetime import time

import pytest

from azu.cluster.lending import Hours, LendingTerms, Pace, Pauses
from azu.errors import InvalidRequest
from azu.units import MIB

NOON, MIDNIGHT = time(12), time(0)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22-07", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "21:59"]),
        ("8:30-17", ["08:30", "16:59"], ["08:29", "17:00", "00:00"]),
        ("18-24", ["18:00", "23:59"], ["00:00", "17:59"]),
        ("0-0", ["00:00", "12:00"], []),
    ],
)
def test_hours_are_a_part_of_each_day_also_over_midnight(
    text: str, inside: list[str], outside: list[str]
) -> None:
    hours = Hours.parse(text)

    assert [one for one in inside if not hours.contain(time.fromisoformat(one))] == []
    assert [one for one in outside if hours.contain(time.fromisoformat(one))] == []


@pytest.mark.parametrize("text", ["", "22", "25-07", "22-07-08", "8:60-9", "ten-noon", "-1-5"])
def test_what_is_no_part_of_a_day_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="no part of a day, such as 22-07"):
        Hours.parse(text)


def test_terms_are_the_same_in_the_environment_of_the_node() -> None:
    terms = LendingTerms(Hours.parse("22-07"), 80.0, True, 10 * MIB, MIB)

    assert LendingTerms.from_json(terms.to_json()) == terms
    assert LendingTerms.from_json(LendingTerms().to_json()) == LendingTerms()


def test_without_terms_a_node_lends_at_all_times() -> None:
    assert Pauses(LendingTerms()).why(MIDNIGHT, 0.0, celsius=120.0, others_load=1.0) == ""


def test_a_node_is_paused_outside_of_its_hours() -> None:
    pauses = Pauses(LendingTerms(hours=Hours.parse("22-07")))

    assert pauses.why(MIDNIGHT, 0.0, None, None) == ""
    assert pauses.why(NOON, 0.0, None, None) == "outside of its hours"


def test_a_hot_device_lends_again_when_it_is_clearly_cooler() -> None:
    pauses = Pauses(LendingTerms(max_celsius=80.0))
    seen = [pauses.why(NOON, 0.0, celsius, None) for celsius in (79, 80, 78, 75, 74, 79)]

    assert seen == ["", *[f"its device has {celsius} degrees" for celsius in (80, 78, 75)], "", ""]
    assert pauses.why(NOON, 0.0, None, None) == "", "no sensor"


def test_a_device_that_others_use_is_left_to_them_until_they_are_quiet_for_a_while() -> None:
    pauses = Pauses(LendingTerms(yields=True))

    def whys(load: float | None, from_s: int, until_s: int) -> list[bool]:
        return [bool(pauses.why(NOON, now_s, None, load)) for now_s in range(from_s, until_s)]

    assert not any(whys(0.9, 0, 10) + whys(0.0, 10, 11) + whys(0.9, 11, 21)), "a short use"
    assert all(whys(0.9, 21, 60))
    assert all(whys(0.0, 60, 179) + whys(0.9, 179, 180) + whys(0.1, 180, 300))
    assert not any(whys(0.1, 300, 400)), "quiet for two minutes"
    assert not any(whys(None, 400, 500)), "it cannot be measured"


def test_bytes_are_fetched_at_the_pace_that_the_owner_allows() -> None:
    pace, now_s = Pace(10 * MIB), 100.0
    for _ in range(6):
        now_s += pace.wait_s(5 * MIB, now_s)
    assert now_s == pytest.approx(102.5), "the first of them at once"
    assert pace.wait_s(MIB, 200.0) == 0.0, "what was not used is not saved up"
    assert pace.wait_s(MIB, 200.0) == pytest.approx(0.1)
    assert Pace(None).wait_s(2**40, 0.0) == 0.0


def test_what_was_seen_before_a_pause_says_nothing_after_it() -> None:
    pauses = Pauses(LendingTerms(hours=Hours.parse("8-20"), yields=True))
    assert pauses.why(time(19, 59), 0.0, None, 0.9) == ""
    assert pauses.why(time(20, 0), 60.0, None, 0.0) == "outside of its hours"
    assert pauses.why(time(8, 0), 43_260.0, None, 0.9) == "", "it has been used for a moment"
