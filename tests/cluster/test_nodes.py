"""A node is judged by the silence since its last report, its room by what is placed on it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.cluster.nodes import NodeTable, NodeVersions, NumericsMarks, node_called
from azu.errors import Conflict, NotFound
from azu.protocol.node import NodeState
from azu.protocol.versions import Versions
from azu.units import MIB
from tests.builders import node


def table(died: list[str] | None = None) -> NodeTable:
    return NodeTable(suspect_s=3, dead_s=5, on_dead=[].append if died is None else died.append)


def judge_each_second(nodes: NodeTable, from_s: float, until_s: float) -> None:
    """Judge once a second, as the scheduler does."""
    now_s = from_s
    while now_s < until_s:
        nodes.judge(now_s)
        now_s += 1
    nodes.judge(until_s)


def state(nodes: NodeTable, now_s: float) -> NodeState:
    return nodes.nodes(now_s, {})[0].state


@pytest.mark.parametrize(
    ("silence_s", "expected"),
    [(0, NodeState.ALIVE), (2.9, NodeState.ALIVE), (3, NodeState.SUSPECT), (5, NodeState.DEAD)],
)
def test_silence_makes_a_node_suspect_and_then_dead(silence_s: float, expected: NodeState) -> None:
    nodes = table()
    nodes.record(node("a"), now_s=100)
    judge_each_second(nodes, 100, 100 + silence_s)

    assert state(nodes, 100 + silence_s) is expected


def test_a_report_ends_a_nodes_suspicion_at_once() -> None:
    nodes = table()
    nodes.record(node("a"), now_s=100)
    judge_each_second(nodes, 100, 104)
    nodes.record(node("a"), now_s=104)

    assert state(nodes, 104) is NodeState.ALIVE


def test_a_death_is_reported_once_and_again_only_after_the_node_lived() -> None:
    died: list[str] = []
    nodes = table(died)
    nodes.record(node("a"), now_s=100)
    judge_each_second(nodes, 100, 104.9)
    assert died == []
    judge_each_second(nodes, 105, 120)
    assert died == ["a"]
    nodes.record(node("a"), now_s=121)
    judge_each_second(nodes, 121, 131)  # twice the time, as the first alarm was false
    assert died == ["a", "a"]


def test_a_node_that_ray_removes_is_dead_at_once_and_not_again_after_silence() -> None:
    died: list[str] = []
    nodes = table(died)
    for name in "ab":
        nodes.record(node(name), now_s=100)
    nodes.remove("a", now_s=100)
    assert died == ["a"]
    judge_each_second(nodes, 100, 106)
    nodes.remove("b", now_s=106)
    nodes.remove("stranger", now_s=106)

    assert died == ["a", "b"]
    assert nodes.nodes(106, {}) == ()


def test_a_dead_node_that_reports_again_gets_no_work_for_a_while() -> None:
    nodes = table()
    nodes.record(node("a"), now_s=100)
    judge_each_second(nodes, 100, 110)
    states = []
    for now_s in range(110, 118):
        nodes.record(node("a"), now_s)
        nodes.judge(now_s)
        states.append(state(nodes, now_s))

    assert states == [NodeState.SUSPECT] * 5 + [NodeState.ALIVE] * 3


def test_a_node_that_sends_a_bad_frame_is_suspect_at_once_however_often_its_agent_reports() -> None:
    nodes = table()
    nodes.record(node("a"), now_s=100)
    nodes.suspect("a", now_s=100)
    nodes.suspect("stranger", now_s=100)
    nodes.record(node("a"), now_s=101)
    assert state(nodes, 101) is NodeState.SUSPECT
    nodes.record(node("a"), now_s=103)
    assert state(nodes, 103) is NodeState.ALIVE


def test_a_node_that_answers_late_is_suspected_without_blame_and_no_longer_each_time() -> None:
    nodes = table()
    for now_s in (100, 110, 120):
        nodes.record(node("a"), now_s)
        nodes.suspect("a", now_s)
    nodes.record(node("a"), 123)

    (judged,) = nodes.nodes(123, {})
    assert (judged.state, judged.bad_frames) == (NodeState.ALIVE, 0)


def test_a_node_without_reports_is_not_dead_while_one_of_its_processes_answers() -> None:
    died: list[str] = []
    nodes = table(died)
    nodes.record(node("a"), now_s=100)
    for now_s in range(101, 160):
        if now_s % 4 == 0:
            nodes.heard("a", now_s)
        nodes.judge(now_s)
    assert died == []
    assert state(nodes, 159) is NodeState.SUSPECT, "it gets no new work"

    nodes.heard("stranger", 159)
    judge_each_second(nodes, 160, 170)
    assert died == ["a"]


def test_a_node_that_was_silent_for_long_gets_twice_the_time_for_a_while() -> None:
    died: list[str] = []
    nodes = table(died)
    nodes.record(node("a"), now_s=100)
    judge_each_second(nodes, 100, 104)
    nodes.record(node("a"), now_s=104)
    judge_each_second(nodes, 104, 113)
    assert died == []
    judge_each_second(nodes, 114, 115)
    assert died == ["a"]

    for now_s in range(116, 800):
        nodes.record(node("a"), now_s)
        nodes.judge(now_s)
    judge_each_second(nodes, 800, 804)
    assert died == ["a", "a"]


def test_each_bad_frame_counts_against_its_sender() -> None:
    nodes = table()
    nodes.record(node("a"), now_s=100)
    for now_s in (100, 110):
        nodes.blame("a", now_s)
    nodes.record(node("a"), now_s=114)

    (judged,) = nodes.nodes(114, {})
    assert (judged.state, judged.bad_frames) == (NodeState.SUSPECT, 2)  # twice as long as the first time
    nodes.record(node("a"), now_s=116)
    assert state(nodes, 116) is NodeState.ALIVE


def test_no_node_dies_of_a_time_in_which_the_scheduler_took_no_reports() -> None:
    died: list[str] = []
    nodes = table(died)
    nodes.record(node("a"), now_s=100)
    nodes.judge(100)
    nodes.judge(160)  # the scheduler itself was stopped for a minute

    assert died == []
    assert state(nodes, 160) is NodeState.ALIVE
    judge_each_second(nodes, 161, 164)
    assert died == ["a"]


def test_a_leaving_node_that_falls_silent_does_not_become_merely_suspect() -> None:
    nodes = table()
    nodes.record(node("a", state=NodeState.LEAVING), now_s=100)
    judge_each_second(nodes, 100, 104)

    assert state(nodes, 104) is NodeState.LEAVING


def test_a_node_that_was_ended_has_left_and_its_bad_frames_are_no_sign_of_a_death() -> None:
    died: list[str] = []
    nodes = table(died)
    for name in "abc":
        nodes.record(node(name), now_s=100)
    nodes.remove("a", now_s=101, ended=True)
    nodes.remove("b", now_s=101)
    assert died == ["a", "b"], "their pieces are lost either way"

    (left,) = nodes.left(110)
    assert (left.node_id, left.state, left.vram_free_bytes) == ("a", NodeState.LEFT, 0)
    assert [one.node_id for one in nodes.nodes(110, {})] == ["c"], "no plan sees it"
    assert nodes.left(701) == ()


def test_a_node_that_was_told_to_leave_and_is_silent_has_left() -> None:
    nodes = table()
    nodes.record(node("a", state=NodeState.LEAVING), now_s=100)
    judge_each_second(nodes, 100, 105)
    assert state(nodes, 105) is NodeState.LEFT

    nodes.remove("a", now_s=106)
    assert [one.state for one in nodes.left(106)] == [NodeState.LEFT]


def test_a_node_that_is_there_again_is_not_listed_twice() -> None:
    nodes = table()
    nodes.record(node("a1", name="ada", state=NodeState.LEAVING), now_s=100)
    nodes.remove("a1", now_s=101)
    nodes.record(node("a2", name="ada"), now_s=102)

    assert nodes.left(102) == ()


def test_pieces_that_would_be_gone_give_back_what_they_hold_and_no_more() -> None:
    nodes = table()
    nodes.record(node("a", 10 * MIB, vram_free_bytes=3 * MIB, vram_used_bytes=6 * MIB), 0)

    (beside,), (without,) = nodes.nodes(0, {"a": 7 * MIB}), nodes.nodes(0, {"a": 2 * MIB}, {"a": 5 * MIB})

    assert beside.vram_free_bytes == 2 * MIB
    # One MiB belongs to other programs.
    assert without.vram_free_bytes == 7 * MIB


def test_without_a_figure_of_azus_own_use_room_is_the_lesser_of_free_and_not_promised() -> None:
    nodes = table()
    nodes.record(node("a", 10 * MIB, vram_free_bytes=7 * MIB), now_s=0)

    assert nodes.nodes(0, {"a": 2 * MIB})[0].vram_free_bytes == 7 * MIB
    assert nodes.nodes(0, {"a": 4 * MIB})[0].vram_free_bytes == 6 * MIB
    assert nodes.nodes(0, {"a": 12 * MIB})[0].vram_free_bytes == 0


def test_what_is_placed_but_not_loaded_is_not_promised_again_beside_another_program() -> None:
    """Of 10 MiB another program holds 4: what is placed takes from the 6, loaded or not."""
    nodes = table()
    for used in (0, 1 * MIB, 2 * MIB):
        report = node("a", 10 * MIB, vram_free_bytes=6 * MIB - used, vram_used_bytes=used)
        nodes.record(report, now_s=0)
        assert nodes.nodes(0, {"a": 2 * MIB})[0].vram_free_bytes == 4 * MIB


@given(
    lent=st.integers(0, 100),
    other=st.integers(0, 100),
    placed=st.integers(0, 100),
    loaded=st.integers(0, 100),
    is_known=st.booleans(),
)
def test_room_never_exceeds_what_the_card_has_nor_what_is_lent(
    lent: int, other: int, placed: int, loaded: int, is_known: bool
) -> None:
    card = 100
    used = min(loaded, placed)
    free = max(0, min(lent - used, card - other - used))
    nodes = table()
    nodes.record(node("a", lent, vram_free_bytes=free, vram_used_bytes=used if is_known else None), now_s=0)
    room = nodes.nodes(0, {"a": placed})[0].vram_free_bytes

    assert room <= max(0, lent - placed)
    assert room <= free
    if is_known:
        assert room <= max(0, card - other - placed)


def test_nodes_come_in_the_order_of_their_ids_and_go_when_removed() -> None:
    nodes = table()
    for name in "cab":
        nodes.record(node(name), now_s=0)
    nodes.remove("b", now_s=0)

    assert [found.node_id for found in nodes.nodes(0, {})] == ["a", "c"]


HOUR_S = 3600
LAYER = ("test/model", 3)


def doubted(*marks: tuple[str, str, float]) -> NumericsMarks:
    """Return marks of (node, owner, time)."""
    found = NumericsMarks()
    for node_id, owner, now_s in marks:
        found.mark(LAYER, node_id, owner, now_s)
    return found


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([("a", "x", 0), ("a", "y", 1), ("a", "z", HOUR_S - 1)], {"a"}),
        ([("a", "x", 0), ("a", "y", 1), ("a", "z", HOUR_S)], set()),  # the first is an hour old
        ([("a", "x", 0), ("a", "y", 1), ("a", "y", 2), ("a", "x", 3)], set()),  # two owners
        ([("a", "x", 0), ("b", "y", 1), ("a", "y", 2), ("a", "z", 3)], set()),  # another node does as well
        ([("a", "x", 0), ("a", "y", 1), ("a", "z", 2), ("b", "x", 5 * HOUR_S)], set()),
    ],
)
def test_marks_of_three_owners_within_an_hour_and_of_no_other_node_raise_doubt(marks, expected) -> None:
    assert doubted(*marks).doubted == expected


def test_a_doubted_node_is_blamed_once_its_replacement_ran_for_an_hour_without_a_mark() -> None:
    marks = doubted(("a", "x", 0), ("a", "y", 1), ("a", "z", 2))

    assert marks.judge({"a"}, 10) == frozenset(), "it holds the piece still"
    assert marks.judge({"b"}, 5 * HOUR_S) == frozenset(), "the replacement begins"
    assert marks.judge({"b"}, 6 * HOUR_S - 1) == frozenset()
    assert marks.judge({"b"}, 6 * HOUR_S) == {"a"}
    assert marks.doubted == marks.judge({"b"}, 9 * HOUR_S) == frozenset()


def test_a_layer_that_two_nodes_were_marked_for_is_excused_for_good() -> None:
    marks = doubted(("a", "x", 0), ("a", "y", 1), ("a", "z", 2), ("b", "z", 3))
    for owner in "xyz":
        marks.mark(LAYER, "b", owner, 3 * HOUR_S)

    assert marks.doubted == frozenset()
    assert marks.judge({}, 9 * HOUR_S) == frozenset()


def test_a_doubted_node_is_suspect_and_told_apart_in_the_reports() -> None:
    nodes = table()
    nodes.record(node("a"), now_s=0)
    for owner in "xyz":
        nodes.marks.mark(LAYER, "a", owner, 0)

    assert state(nodes, 0) is NodeState.SUSPECT
    assert [one.state for one in nodes.reports(now_s=3.0)] == [NodeState.SUSPECT]


def test_a_node_that_is_left_out_takes_nothing_for_an_hour_and_longer_the_next_time() -> None:
    nodes = table()

    def found(now_s: float) -> tuple[NodeState, NodeState]:
        nodes.record(node("a"), now_s)
        return state(nodes, now_s), nodes.reports(now_s)[0].state

    assert found(0) == (NodeState.ALIVE, NodeState.ALIVE)
    nodes.leave_out("a", now_s=0)
    assert found(HOUR_S - 1) == (NodeState.SUSPECT, NodeState.SUSPECT)
    assert found(HOUR_S) == (NodeState.ALIVE, NodeState.ALIVE)
    nodes.leave_out("a", now_s=HOUR_S)
    assert found(3 * HOUR_S - 1) == (NodeState.SUSPECT, NodeState.SUSPECT)
    assert found(3 * HOUR_S) == (NodeState.ALIVE, NodeState.ALIVE)
    nodes.leave_out("unknown", now_s=0)


def test_nodes_of_a_network_all_share_a_version() -> None:
    nodes = NodeVersions(Versions(newest=2, oldest=1, release="0.2"))

    assert nodes.take("old", Versions(1, 0, "0.1"))
    # The head understands it, the node that came before does not.
    assert not nodes.take("new", Versions(3, 2, "0.3"))
    assert nodes.refused == {
        "new": "azu 0.3 on this node is too new for the network: install azu 0.2 on the node"
    }
    assert nodes.knows("new")

    for node_id in ("old", "new"):
        nodes.forget(node_id)
    assert not nodes.knows("new")
    assert nodes.take("new", Versions(3, 2, "0.3"))
    assert not nodes.refused


def test_a_node_is_found_by_its_name_or_the_beginning_of_its_id() -> None:
    ben, ada, other_ada = (
        replace(node(node_id), name=name)
        for node_id, name in (("b0" * 28, "ben"), ("a1" * 28, "ada"), ("a2" * 28, "ada"))
    )

    assert node_called("ben", [ada, ben]) == ben
    assert node_called("a2a2a2a2", [ada, ben, other_ada]) == other_ada
    for unknown in ("eve", "a2a2a2", ""):
        with pytest.raises(NotFound, match=f"no node {unknown} of yours"):
            node_called(unknown, [ada, ben, other_ada])
    with pytest.raises(
        Conflict, match="2 nodes are called ada: give one's id instead, of a1a1a1a1a1a1, a2a2"
    ):
        node_called("ada", [ada, ben, other_ada])


def test_nodes_that_left_long_ago_are_forgotten_though_none_asks_for_them() -> None:
    nodes = table()
    for number in range(50):
        nodes.record(node(f"n{number}"), now_s=700 * number)
        nodes.remove(f"n{number}", now_s=700 * number + 1, ended=True)

    assert nodes._left.keys() == {"n49"}
