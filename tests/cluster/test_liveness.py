"""A piece that comes on is at most slow; one that stands still for long hangs; slow nodes are left."""

import pytest

from azu.cluster.liveness import PieceWatch, Pulse, SlowNodes, UnansweredCall, relative_slowdowns
from azu.protocol.step import PieceProgress, PieceState
from azu.protocol.topology import Stage
from tests.builders import node


def busy(step: int, layers: int = 0, expected_s: float | None = 0.1) -> PieceProgress:
    return PieceProgress(step, layers, PieceState.BUSY, expected_s)


def idle(step: int, expected_s: float | None = 0.1) -> PieceProgress:
    return PieceProgress(step, 0, PieceState.IDLE, expected_s)


def judged_each_second(watch: PieceWatch, until_s: int, from_s: int = 1) -> list[Pulse]:
    return [watch.judge(float(now_s)) for now_s in range(from_s, until_s + 1)]


def hangs_after(watch: PieceWatch, from_s: int) -> int:
    """Return how many seconds after `from_s` a piece hangs from which nothing is heard any more."""
    now_s = from_s
    while watch.judge(float(now_s)) is not Pulse.HUNG:
        now_s += 1
    return now_s - from_s


@pytest.mark.parametrize(("expected_s", "hangs_s"), [(0.01, 60), (1.2, 60), (2.0, 100), (30.0, 1500)])
def test_a_piece_hangs_that_stands_still_for_a_minute_and_fifty_steps(
    expected_s: float, hangs_s: int
) -> None:
    watch = PieceWatch(0.0)
    watch.answered(busy(1, expected_s=expected_s), 0.0)

    assert hangs_after(watch, 0) == hangs_s


def test_a_slow_piece_whose_layers_move_never_hangs() -> None:
    watch = PieceWatch(0.0)
    pulses = []
    for layer in range(20):
        watch.answered(busy(1, layer), 50.0 * layer)
        pulses += judged_each_second(watch, 50 * layer + 50, 50 * layer + 1)

    assert set(pulses) == {Pulse.STEADY, Pulse.SLOW}


def test_answers_alone_do_not_help_a_piece_that_computes_and_stands_still() -> None:
    watch = PieceWatch(0.0)
    for now_s in range(61):
        watch.answered(busy(5, 2), float(now_s))
        pulse = watch.judge(float(now_s))

    assert pulse is Pulse.HUNG


@pytest.mark.parametrize("state", [PieceState.IDLE, PieceState.WAITING])
def test_a_piece_without_a_step_or_that_waits_for_another_may_stand_still(state: PieceState) -> None:
    watch = PieceWatch(0.0)
    for now_s in range(500):
        watch.answered(PieceProgress(5, 2, state, 0.1), float(now_s))
        assert watch.judge(float(now_s)) is Pulse.STEADY


def test_a_fresh_piece_has_longer_until_its_first_answer_and_in_its_first_step() -> None:
    assert hangs_after(PieceWatch(0.0), 0) == 300
    first = PieceWatch(0.0)
    first.answered(busy(1, expected_s=None), 0.0)
    assert hangs_after(first, 0) == 300
    answered = PieceWatch(0.0)
    answered.answered(idle(0, expected_s=None), 0.0)
    assert hangs_after(answered, 0) == 60


def test_after_a_false_alarm_a_piece_has_twice_the_time_for_a_while() -> None:
    watch = PieceWatch(0.0)
    watch.answered(busy(1), 0.0)
    judged_each_second(watch, 40)
    watch.answered(busy(2), 40.0)
    assert hangs_after(watch, 40) == 120

    watch.answered(busy(3), 165.0)
    for now_s in range(166, 900):
        watch.answered(busy(now_s), float(now_s))
        watch.judge(float(now_s))
    assert hangs_after(watch, 899) == 60


def test_time_in_which_the_asker_was_stopped_counts_for_no_piece() -> None:
    watch = PieceWatch(0.0)
    watch.answered(busy(1), 0.0)
    judged_each_second(watch, 10)

    assert watch.judge(400.0) is not Pulse.HUNG
    assert 40 <= hangs_after(watch, 400) <= 60


def test_a_call_is_lost_only_when_its_piece_is_idle_and_stays_so() -> None:
    for states in ([busy(1), busy(1), busy(1)], [idle(1), idle(2), busy(3), idle(3)], [idle(1)]):
        call = UnansweredCall()
        assert not any(call.is_lost(one) for one in states)
    call = UnansweredCall()
    assert [call.is_lost(one) for one in (busy(1), idle(1), idle(1))] == [False, False, True]


def test_a_piece_is_slow_only_beside_the_others_of_its_model() -> None:
    stages = [(Stage, index) for index in range(3)]

    assert relative_slowdowns(dict(zip(stages, (8.0, 8.0, 8.0), strict=True))) == dict.fromkeys(stages, 1.0)
    assert relative_slowdowns(dict(zip(stages, (1.0, 10.0, 1.0), strict=True)))[Stage, 1] == 10.0
    assert relative_slowdowns({(Stage, 0): 6.0}) == {(Stage, 0): 6.0}


def test_a_slow_node_is_remembered_for_a_while_after_its_pieces_have_left() -> None:
    slow, nodes = SlowNodes(600.0), [node("a"), node("b")]
    slow.note({"a": 10.0, "b": 2.9}, 0.0)
    slow.note({"b": 1.0}, 1.0)

    speeds = [one.memory_bytes_per_s for one in slow.slowed(nodes, 599.0)]
    assert speeds == [nodes[0].memory_bytes_per_s / 10, nodes[1].memory_bytes_per_s]
    assert slow.slowed(nodes, 600.0) == nodes
    slow.note({}, 600.0)
    assert not slow._until_s
