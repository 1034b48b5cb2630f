"""Choices are counted by the router and by the set: the smaller number is paid, the platform has the rest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.engine import expert_counts
from azu.engine.expert_counts import Holder, ReceivedChoices, ReportedStep, check_received
from azu.errors import FrameError
from azu.protocol.step import ExpertWork

# One layer, whose router has some experts itself; its tokens made 20 choices.
NODES: dict[Holder, str] = {(1, None): "r", (1, 0): "a", (1, 1): "b"}
SAID = {None: 4, 0: 10, 1: 6}


def paid(said: dict[int | None, int], got: dict[int, int]) -> dict[int | None, int]:
    """Return what each holder is paid for, by what the router says and what sets say that they got."""
    work = tuple(ExpertWork(1, holder, {7: count}) for holder, count in said.items() if count)
    reported = ReportedStep(3, work, frozenset({7}), NODES)
    differences = reported.compared({index: {3: {1: count}} for index, count in got.items()})
    return said | {one.holder[1]: one.paid for one in differences}


@pytest.mark.parametrize(
    ("said", "got", "expected"),
    [
        (SAID, {0: 10, 1: 6}, SAID),
        (SAID, {}, SAID),  # no set answers
        (SAID, {0: 10}, SAID),
        # The router counts what it did not send as its own, or sends and does not say so.
        ({None: 14, 0: 0, 1: 6}, {0: 10, 1: 6}, {None: 4, 0: 0, 1: 6}),
        ({None: 20, 0: 0, 1: 0}, {0: 10, 1: 6}, {None: 4, 0: 0, 1: 0}),
        # The router has one set be paid for what another set got.
        ({None: 4, 0: 16, 1: 0}, {0: 10, 1: 6}, {None: 4, 0: 10, 1: 0}),
        # The same, and the set that gains says so too.
        ({None: 4, 0: 16, 1: 0}, {0: 16, 1: 6}, {None: 0, 0: 14, 1: 0}),
        # A set says that it got more, or less.
        (SAID, {0: 1000, 1: 6}, {None: 0, 0: 10, 1: 0}),
        (SAID, {0: 12, 1: 6}, {None: 2, 0: 10, 1: 6}),
        (SAID, {0: 3, 1: 6}, {None: 4, 0: 3, 1: 6}),
        (SAID, {0: 0, 1: 0}, {None: 4, 0: 0, 1: 0}),
    ],
)
def test_no_holder_is_paid_more_than_both_ends_say(
    said: dict[int | None, int], got: dict[int, int], expected: dict[int | None, int]
) -> None:
    assert paid(said, got) == expected
    assert sum(expected.values()) <= 20


COUNTS = st.integers(0, 9)


@given(st.tuples(COUNTS, COUNTS, COUNTS, COUNTS), st.data())
def test_owners_who_agree_gain_nothing_by_what_they_say(ran: tuple[int, ...], data: st.DataObject) -> None:
    """The router's stage and the sets 0 and 1 have one owner; the set 2 says what it got."""
    nodes = {(1, None): "r", (1, 0): "r", (1, 1): "r", (1, 2): "honest"}
    splits = data.draw(st.lists(st.integers(0, sum(ran)), min_size=3, max_size=3).map(sorted))
    said = dict(zip((None, 0, 1, 2), np.diff([0, *splits, sum(ran)]).tolist(), strict=True))
    got = {0: data.draw(COUNTS), 1: data.draw(st.integers(0, 99)), 2: ran[3]}
    work = tuple(ExpertWork(1, holder, {7: count}) for holder, count in said.items() if count)

    found = ReportedStep(3, work, frozenset({7}), nodes).compared({i: {3: {1: n}} for i, n in got.items()})
    paid = said | {one.holder[1]: one.paid for one in found}

    assert paid[None] + paid[0] + paid[1] <= sum(ran[:3])
    assert paid[2] <= ran[3]


def test_a_set_tells_what_it_got_in_the_steps_of_one_epoch() -> None:
    received = ReceivedChoices()
    received.add(epoch=1, step=5, layer=2, choices=3)
    received.add(epoch=2, step=5, layer=2, choices=4)
    received.add(epoch=2, step=5, layer=2, choices=1)
    received.add(epoch=2, step=6, layer=4, choices=9)

    assert received.of(2, [5, 6, 7]) == {5: {2: 5}, 6: {4: 9}}


def test_a_set_that_has_forgotten_a_step_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_counts, "_KEPT_STEPS", 2)
    received = ReceivedChoices()
    for step in (1, 2, 3):
        received.add(1, step, 0, 1)

    assert received.of(1, [1, 2]) is None
    assert received.of(1, [2, 3]) == {2: {0: 1}, 3: {0: 1}}


@pytest.mark.parametrize(
    "answer",
    [{9: {1: 5}}, {3: {1: -1}}, {3: {1: 1.0}}, {3: {1: True}}, {3: {"1": 1}}, {3: 5}, {3: None}, [3], 3, "3"],
)
def test_what_no_set_can_have_got_is_a_bad_frame(answer: object) -> None:
    assert check_received({3: {1: 5}}, [3, 4]) == {3: {1: 5}}
    with pytest.raises(FrameError):
        check_received(answer, [3, 4])
