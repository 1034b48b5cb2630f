"""What a sender takes for the time on the way."""

import pytest

from azu.engine.hops import StageClock, hop_s


def test_what_the_stage_computes_is_not_on_the_way() -> None:
    stay = StageClock().stay(taken_s=5.0, done_s=5.2)

    assert hop_s(0.203, stay) == pytest.approx(0.003)


def test_a_frame_that_found_the_stage_busy_says_nothing() -> None:
    clock = StageClock()
    clock.stay(5.0, 5.2)

    assert hop_s(0.4, clock.stay(5.2001, 5.4)) is None
    assert hop_s(0.203, clock.stay(6.0, 6.2)) == pytest.approx(0.003)
