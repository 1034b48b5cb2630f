"""Several pipelines where nodes allow."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.errors import InsufficientCapacity
from azu.planner.plan import plan
from azu.planner.replicas import plan_replicas, takes_spare_room
from azu.protocol.node import Node
from azu.protocol.topology import Topology
from azu.units import MIB
from tests.builders import node, structure
from tests.planner.test_plan import POLICY, assert_whole, models, nodes_of_all_kinds


def test_a_model_gets_as_many_pipelines_as_nodes_allow_and_as_are_wanted() -> None:
    nodes = [node(name, 5 * MIB) for name in "abcde"]
    model = structure(6)

    assert [len(one.stages) for one in plan_replicas(model, nodes, POLICY, most=9)] == [2, 2]
    assert len(plan_replicas(model, nodes, POLICY, most=1)) == 1
    assert [one.epoch for one in plan_replicas(model, nodes, POLICY, most=9, epoch=4)] == [4, 5]


def test_a_pipeline_that_would_crawl_leaves_its_nodes_to_others() -> None:
    nodes = [
        node("a", memory_bytes_per_s=1e8, flops_per_s=1e13),
        node("b", memory_bytes_per_s=1e9, flops_per_s=1e13),
    ]

    assert [one.stages[0].node_id for one in plan_replicas(structure(4), nodes, POLICY, most=2)] == ["b"]
    patient = replace(POLICY, least_replica_speed=0.01)
    assert len(plan_replicas(structure(4), nodes, patient, most=2)) == 2


def test_not_even_one_is_an_error() -> None:
    with pytest.raises(InsufficientCapacity):
        plan_replicas(structure(60), [node("a", 4 * MIB)], POLICY, most=3)


@settings(deadline=None, max_examples=60)
@given(
    model=models, nodes=nodes_of_all_kinds, most=st.integers(1, 4), shuffle=st.randoms(use_true_random=False)
)
def test_pipelines_are_whole_share_no_node_and_come_fastest_first(model, nodes, most, shuffle) -> None:
    try:
        pipelines = plan_replicas(model, nodes, POLICY, most=most)
    except InsufficientCapacity:
        return
    used = [node_id for one in pipelines for node_id in one.vram_bytes_by_node]
    assert len(used) == len(set(used))
    assert 1 <= len(pipelines) <= most
    for one in pipelines:
        assert_whole(one, model, nodes)
    shuffled = list(nodes)
    shuffle.shuffle(shuffled)
    assert plan_replicas(model, shuffled, POLICY, most=most) == pipelines


@pytest.mark.parametrize(
    ("sizes", "takes"),
    [
        pytest.param({"b": 64, "c": 64}, False, id="enough for both"),
        pytest.param({"b": 8}, True, id="the only spare node"),
        pytest.param({"b": 8, "c": 8}, False, id="another spare node is left"),
        pytest.param({"b": 5}, False, id="it was no spare node for the other model before"),
    ],
)
def test_a_further_pipeline_leaves_others_the_room_for_what_they_may_lose(sizes, takes) -> None:
    small, large = structure(2), structure(4)
    nodes = [node("a", 8 * MIB), *(node(name, mib * MIB) for name, mib in sizes.items())]
    other = plan(large, nodes[:1], POLICY)
    another = plan(small, nodes[1:2], POLICY).vram_bytes_by_node

    assert takes_spare_room(another, [(large, other)], rooms_beside(other, nodes), POLICY) is takes


def rooms_beside(topology: Topology, nodes: list[Node]) -> list[Node]:
    """Return the nodes with the room that a topology leaves."""
    used = topology.vram_bytes_by_node
    return [replace(one, vram_free_bytes=one.vram_free_bytes - used.get(one.node_id, 0)) for one in nodes]
