"""Replicas where nodes have room: further pipelines of a model, and second copies of hot experts."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.errors import InsufficientCapacity
from azu.planner.plan import plan
from azu.planner.replan import replan
from azu.planner.replicas import expert_heat, plan_pipelines, takes_spare_room, with_hot_replicas
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, PieceSet, Topology
from azu.units import MIB
from tests.builders import node, structure
from tests.planner.test_plan import POLICY, assert_whole, models, nodes_of_all_kinds


def test_a_model_gets_pipelines_up_to_the_limit_while_nodes_have_room() -> None:
    nodes = [node(name, 5 * MIB) for name in "abcde"]
    model = structure(6)

    assert [len(one.stages) for one in plan_pipelines(model, nodes, POLICY, most=9)] == [2, 2]
    assert len(plan_pipelines(model, nodes, POLICY, most=1)) == 1
    assert [one.epoch for one in plan_pipelines(model, nodes, POLICY, most=9, epoch=4)] == [4, 5]


def test_a_pipeline_that_would_be_too_slow_is_not_planned() -> None:
    nodes = [
        node("a", memory_bytes_per_s=1e8, flops_per_s=1e13),
        node("b", memory_bytes_per_s=1e9, flops_per_s=1e13),
    ]

    assert [one.stages[0].node_id for one in plan_pipelines(structure(4), nodes, POLICY, most=2)] == ["b"]
    patient = replace(POLICY, least_replica_speed=0.01)
    assert len(plan_pipelines(structure(4), nodes, patient, most=2)) == 2


def test_it_is_an_error_when_not_even_one_pipeline_fits() -> None:
    with pytest.raises(InsufficientCapacity):
        plan_pipelines(structure(60), [node("a", 4 * MIB)], POLICY, most=3)


@settings(deadline=None, max_examples=60)
@given(
    model=models, nodes=nodes_of_all_kinds, most=st.integers(1, 4), shuffle=st.randoms(use_true_random=False)
)
def test_pipelines_are_whole_share_no_node_and_come_fastest_first(model, nodes, most, shuffle) -> None:
    try:
        pipelines = plan_pipelines(model, nodes, POLICY, most=most)
    except InsufficientCapacity:
        return
    used = [node_id for one in pipelines for node_id in one.vram_bytes_by_node]
    assert len(used) == len(set(used))
    assert 1 <= len(pipelines) <= most
    for one in pipelines:
        assert_whole(one, model, nodes)
    shuffled = list(nodes)
    shuffle.shuffle(shuffled)
    assert plan_pipelines(model, shuffled, POLICY, most=most) == pipelines


@pytest.mark.parametrize(
    ("sizes", "takes"),
    [
        pytest.param({"b": 64, "c": 64}, False, id="enough for both"),
        pytest.param({"b": 8}, True, id="the only spare node"),
        pytest.param({"b": 8, "c": 8}, False, id="another spare node is left"),
        pytest.param({"b": 5}, False, id="not a spare node for the other model before"),
    ],
)
def test_a_further_pipeline_takes_spare_room_that_another_model_needs_after_a_loss(sizes, takes) -> None:
    small, large = structure(2), structure(4)
    nodes = [node("a", 8 * MIB), *(node(name, mib * MIB) for name, mib in sizes.items())]
    other = plan(large, nodes[:1], POLICY)
    another = plan(small, nodes[1:2], POLICY).vram_bytes_by_node

    assert takes_spare_room(another, [(large, other)], rooms_beside(other, nodes), POLICY) is takes


def rooms_beside(topology: Topology, nodes: list[Node]) -> list[Node]:
    """Return the nodes with the room that is left beside a topology."""
    used = topology.vram_bytes_by_node
    return [replace(one, vram_free_bytes=one.vram_free_bytes - used.get(one.node_id, 0)) for one in nodes]


HOT = POLICY.hot_expert


def with_experts_apart(sizes: dict[str, int]) -> tuple[Structure, list[Node], Topology]:
    """Return a model with two experts apart from their router on "r", and the nodes beside its topology."""
    model = structure(1, moe_layers={0: 8})
    nodes = [node("r", 10 * MIB, memory_bytes_per_s=1e12)]
    nodes += [node(name, mib * MIB) for name, mib in sizes.items()]
    topology = plan(model, nodes, POLICY)
    assert [chosen.experts for chosen in topology.expert_sets] == [{0: (6, 7)}]
    return model, rooms_beside(topology, nodes), topology


def summary(sets: tuple[ExpertSet, ...]) -> list[tuple[int, str, dict[int, tuple[int, ...]], bool]]:
    return [(chosen.index, chosen.node_id, dict(chosen.experts), chosen.is_replica) for chosen in sets]


ORIGINAL = (0, "a", {0: (6, 7)}, False)


def test_a_hot_expert_gets_a_copy_in_a_new_set_where_there_is_room() -> None:
    model, left, topology = with_experts_apart({"a": 4, "b": 2})
    heat = {(0, 6): 0.1, (0, 7): HOT, (0, 0): 9.0}

    grown = with_hot_replicas(model, topology, left, POLICY, heat)
    assert summary(grown.expert_sets) == [ORIGINAL, (1, "b", {0: (7,)}, True)]
    assert grown.without(grown.replicas) == topology


def test_the_hottest_expert_comes_first_where_not_all_fit() -> None:
    model, left, topology = with_experts_apart({"a": 4, "b": 2})

    for hottest in (6, 7):
        heat = {(0, 6): HOT, (0, 7): HOT} | {(0, hottest): 2 * HOT}
        sets = with_hot_replicas(model, topology, left, POLICY, heat).expert_sets
        assert summary(sets) == [ORIGINAL, (1, "b", {0: (hottest,)}, True)]


def test_experts_that_are_not_hot_or_beside_their_router_get_no_replica() -> None:
    model, left, topology = with_experts_apart({"a": 4, "b": 8})

    for heat in ({}, {(0, 6): HOT * 0.99}, {(0, 0): 9.0}):
        assert with_hot_replicas(model, topology, left, POLICY, heat) == topology


def test_without_room_nothing_changes() -> None:
    model, left, topology = with_experts_apart({"a": 4})
    assert with_hot_replicas(model, topology, left, POLICY, {(0, 6): 9.0}) == topology


def test_a_replica_stays_until_its_experts_are_cold() -> None:
    model, left, topology = with_experts_apart({"a": 4, "b": 8})
    grown = with_hot_replicas(model, topology, left, POLICY, {(0, 7): HOT})

    def after(**heat: float) -> Topology:
        return with_hot_replicas(
            model, grown, left, POLICY, {(0, int(name[1:])): one for name, one in heat.items()}
        )

    assert after(e7=HOT * 0.51) == grown
    assert after(e7=HOT * 0.49) == topology
    assert summary(after(e6=HOT, e7=HOT).expert_sets) == [
        *summary(grown.expert_sets),
        (2, "b", {0: (6,)}, True),
    ]
    assert summary(after(e6=HOT).expert_sets) == [ORIGINAL, (1, "b", {0: (6,)}, True)]


def test_a_lost_replica_is_left_out_and_a_lost_original_is_placed_again() -> None:
    model, left, topology = with_experts_apart({"a": 4, "b": 2, "c": 4})
    grown = with_hot_replicas(model, topology, left, POLICY, {(0, 7): HOT})
    assert [chosen.node_id for chosen in grown.expert_sets] == ["a", "b"]

    def again(*lost: int) -> tuple[ExpertSet, ...]:
        loss = PieceSet(expert_sets=frozenset(lost))
        return replan(model, grown, loss, left, POLICY, epoch=2).expert_sets

    assert summary(again(1)) == [ORIGINAL]
    assert summary(again(0, 1)) == [(0, "c", {0: (6, 7)}, False)]


@pytest.mark.parametrize(
    ("before", "now", "heat"),
    [
        pytest.param({}, {0: (6, 2)}, {(0, 0): 1.5, (0, 1): 0.5}, id="since the beginning"),
        pytest.param({0: (6, 2)}, {0: (6, 10)}, {(0, 0): 0.0, (0, 1): 2.0}, id="since the last count"),
        pytest.param({0: (6, 2)}, {0: (6, 9)}, {}, id="too few"),
        pytest.param({0: (60, 20)}, {0: (4, 4)}, {(0, 0): 1.0, (0, 1): 1.0}, id="a stage that restarted"),
        pytest.param({}, {0: (0, 0), 3: (0, 8)}, {(3, 0): 0.0, (3, 1): 2.0}, id="each layer separately"),
    ],
)
def test_heat_is_the_number_of_choices_relative_to_the_average_expert(before, now, heat) -> None:
    assert expert_heat(before, now, least_choices=8) == heat


@settings(deadline=None, max_examples=100)
@given(
    model=models.filter(lambda one: any(layer.num_experts for layer in one.layers)),
    nodes=nodes_of_all_kinds,
    heats=st.lists(st.floats(0, 2 * HOT), min_size=96, max_size=96),
    later=st.lists(st.floats(0, 2 * HOT), min_size=96, max_size=96),
)
def test_replicas_fit_into_memory_and_change_no_other_piece(model, nodes, heats, later) -> None:
    try:
        topology = plan(model, nodes, POLICY)
    except InsufficientCapacity:
        return
    pairs = [(layer.index, e) for layer in model.layers for e in range(layer.num_experts)]
    left = rooms_beside(topology, nodes)
    free = {one.node_id: one.vram_free_bytes for one in nodes}
    before = topology
    for given_heats in (heats, later):
        grown = with_hot_replicas(model, before, left, POLICY, dict(zip(pairs, given_heats, strict=False)))
        assert grown.without(grown.replicas) == topology
        assert all(used <= free[node_id] for node_id, used in grown.vram_bytes_by_node.items())
        indices = [chosen.index for chosen in grown.expert_sets]
        assert len(indices) == len(set(indices))
        assert {one.index: one for one in before.expert_sets}.items() >= {
            one.index: one for one in grown.expert_sets if one in before.expert_sets
        }.items()
        held = [
            (chosen.node_id, layer, expert)
            for chosen in grown.expert_sets
            for layer, ids in chosen.experts.items()
            for expert in ids
        ]
        assert len(held) == len(set(held)), "never twice on one node"
        assert all(grown.stage_of(layer).node_id != node_id for node_id, layer, _ in held)
        before = grown
