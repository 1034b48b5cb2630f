"""Lost pieces are placed on other nodes; no other piece moves."""

from dataclasses import replace

import pytest

from azu.errors import InsufficientCapacity
from azu.planner.policy import PlanPolicy
from azu.planner.replan import replan
from azu.protocol.node import Node, NodeState
from azu.protocol.topology import ExpertSet, PieceSet, Topology
from azu.units import MIB
from tests import builders

_POLICY = PlanPolicy(promised_sequences=1, tokens_per_sequence=64)
_STRUCTURE = builders.structure(4, moe_layers={1: 4})
_TOPOLOGY = replace(
    builders.topology({"a": (0, 2), "b": (2, 4)}, vram_bytes=4 * MIB),
    expert_sets=(ExpertSet(0, "c", {1: (0, 1)}, 2 * MIB), ExpertSet(1, "d", {1: (2, 3)}, 2 * MIB)),
)


def _nodes(**free_mib: int) -> list[Node]:
    return [
        builders.node(name, vram_bytes=8 * MIB, vram_free_bytes=free * MIB) for name, free in free_mib.items()
    ]


def _replan(loss: PieceSet, nodes: list[Node]) -> Topology:
    return replan(_STRUCTURE, _TOPOLOGY, loss, nodes, _POLICY, epoch=7)


def test_only_the_lost_pieces_move() -> None:
    moved = _replan(PieceSet(frozenset({1}), frozenset({0})), _nodes(a=0, b=0, c=0, d=0, e=4, f=2))

    assert moved.epoch == 7
    assert [stage.node_id for stage in moved.stages] == ["a", "e"]
    assert [chosen.node_id for chosen in moved.expert_sets] == ["f", "d"]
    assert [stage.span for stage in moved.stages] == [stage.span for stage in _TOPOLOGY.stages]
    assert [chosen.experts for chosen in moved.expert_sets] == [
        chosen.experts for chosen in _TOPOLOGY.expert_sets
    ]


def test_a_node_that_has_the_shards_is_preferred_to_a_faster_node() -> None:
    fast, cached = builders.node("e", memory_bytes_per_s=1e12), builders.node("f")
    shards = {_STRUCTURE.shard(name).sha256 for name in ("layer_2_dense", "layer_3_dense", "head")}
    cached = replace(cached, cached_shards=frozenset(shards))

    assert _replan(PieceSet(frozenset({1})), [fast, cached]).stages[1].node_id == "f"
    assert _replan(PieceSet(frozenset({0})), [fast, cached]).stages[0].node_id == "e"


def test_several_lost_pieces_never_use_the_same_room() -> None:
    loss = PieceSet(frozenset({0, 1}), frozenset({0, 1}))
    moved = _replan(loss, _nodes(e=8, f=4))

    assert moved.vram_bytes_by_node == {"e": 8 * MIB, "f": 4 * MIB}


def test_the_error_names_the_piece_without_room_and_its_missing_bytes() -> None:
    with pytest.raises(InsufficientCapacity, match=rf"stage 0 .* {MIB} bytes are missing"):
        _replan(PieceSet(frozenset({0})), _nodes(a=3, b=3))


@pytest.mark.parametrize("state", [NodeState.SUSPECT, NodeState.LEAVING, NodeState.DEAD])
def test_no_piece_is_placed_on_a_node_that_is_not_alive(state: NodeState) -> None:
    with pytest.raises(InsufficientCapacity):
        _replan(PieceSet(frozenset({0})), [builders.node("e", state=state)])


def test_pieces_on_a_node_without_a_report_stay_there() -> None:
    moved = _replan(PieceSet(frozenset({1})), _nodes(e=4))

    assert [stage.node_id for stage in moved.stages] == ["a", "e"]
    assert moved.prediction == _TOPOLOGY.prediction
