"""A node is judged by the age of its last word, and its room by what is placed on it."""

import pytest

from azu.lifecycle.nodes import NodeBook
from azu.protocol.node import NodeState
from azu.units import MIB
from tests.builders import node


def book() -> NodeBook:
    return NodeBook(suspect_s=3, dead_s=5)


@pytest.mark.parametrize(
    ("silence_s", "state"),
    [(0, NodeState.ALIVE), (2.9, NodeState.ALIVE), (3, NodeState.SUSPECT), (5, NodeState.DEAD)],
)
def test_silence_makes_a_node_suspect_and_then_dead(silence_s: float, state: NodeState) -> None:
    nodes = book()
    nodes.heard(node("a"), now_s=100)

    assert nodes.nodes(100 + silence_s, {})[0].state is state


def test_a_word_brings_a_silent_node_back() -> None:
    nodes = book()
    nodes.heard(node("a"), now_s=100)
    nodes.heard(node("a"), now_s=110)

    assert nodes.nodes(110, {})[0].state is NodeState.ALIVE


def test_a_leaving_node_that_falls_silent_does_not_become_merely_suspect() -> None:
    nodes = book()
    nodes.heard(node("a", state=NodeState.LEAVING), now_s=100)

    assert nodes.nodes(104, {})[0].state is NodeState.LEAVING


def test_room_is_the_lesser_of_live_free_memory_and_what_is_not_promised() -> None:
    nodes = book()
    nodes.heard(node("a", 10 * MIB, vram_free_bytes=7 * MIB), now_s=0)

    assert nodes.nodes(0, {"a": 2 * MIB})[0].vram_free_bytes == 7 * MIB
    assert nodes.nodes(0, {"a": 4 * MIB})[0].vram_free_bytes == 6 * MIB
    assert nodes.nodes(0, {"a": 12 * MIB})[0].vram_free_bytes == 0


def test_nodes_come_in_the_order_of_their_ids_and_go_when_told() -> None:
    nodes = book()
    for name in "cab":
        nodes.heard(node(name), now_s=0)
    nodes.gone("b")

    assert [found.node_id for found in nodes.nodes(0, {})] == ["a", "c"]
