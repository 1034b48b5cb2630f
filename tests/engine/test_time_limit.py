"""Code that does not come to an end is ended, and nothing after it is."""

import time
from contextlib import suppress

import pytest

from azu.engine.time_limit import OutOfTime, time_limit


def count_for(seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        pass


def test_what_takes_too_long_is_ended_whatever_it_catches() -> None:
    @time_limit(0.05)
    def stubborn() -> None:
        while True:
            with suppress(Exception):
                count_for(60)

    started_s = time.monotonic()
    with pytest.raises(OutOfTime):
        stubborn()
    assert time.monotonic() - started_s < 30


def test_what_ends_in_time_goes_on_undisturbed_behind_the_block() -> None:
    for step in range(200):
        with suppress(OutOfTime), time_limit(0.001):
            count_for(step * 1e-5)
        count_for(0.0005)
    count_for(0.01)
