"""Every layer and expert exactly once, never over a node's memory, the same for the same input."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.errors import InsufficientCapacity
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology
from azu.units import GIB, MIB
from tests.builders import node, structure

POLICY = PlanPolicy(promised_sequences=2, tokens_per_sequence=128, activation_tokens=64)


def assert_whole(topology: Topology, model: Structure, nodes: list[Node]) -> None:
    """Every piece once, consecutive stages, no node over its memory."""
    ends = [0] + [stage.span.end for stage in topology.stages]
    assert [stage.span.start for stage in topology.stages] == ends[:-1]
    assert ends[-1] == model.num_layers
    for layer in model.layers:
        beside = topology.stage_of(layer.index).experts.get(layer.index, ())
        apart = [e for chosen in topology.expert_sets for e in chosen.experts.get(layer.index, ())]
        assert sorted([*beside, *apart]) == list(range(layer.num_experts))
    free = {one.node_id: one.vram_free_bytes for one in nodes}
    for node_id, used in topology.vram_bytes_by_node.items():
        assert used <= free[node_id]


def test_a_model_that_fits_on_one_node_stays_there() -> None:
    topology = plan(structure(4), [node("a"), node("b")], POLICY)

    assert [(stage.node_id, stage.span.start, stage.span.end) for stage in topology.stages] == [("a", 0, 4)]


def test_a_model_that_no_node_holds_is_cut_over_several() -> None:
    nodes = [node(name, 5 * MIB) for name in "abc"]
    model = structure(6)

    topology = plan(model, nodes, POLICY)

    assert len(topology.stages) >= 2
    assert_whole(topology, model, nodes)


def test_a_slow_node_is_left_out_when_the_pipeline_is_faster_without_it() -> None:
    nodes = [node("a", 64 * MIB, memory_bytes_per_s=1e8), node("b", 64 * MIB)]

    assert [stage.node_id for stage in plan(structure(4), nodes, POLICY).stages] == ["b"]


def test_cached_shards_decide_between_equal_nodes() -> None:
    model = structure(4)
    cached = frozenset(one.sha256 for one in model.shards)
    nodes = [node("a"), node("b", cached_shards=cached), node("c")]

    assert [stage.node_id for stage in plan(model, nodes, POLICY).stages] == ["b"]


@pytest.mark.parametrize("state", [NodeState.SUSPECT, NodeState.LEAVING, NodeState.DEAD])
def test_only_live_nodes_get_pieces(state: NodeState) -> None:
    nodes = [node("a", state=state), node("b")]

    assert [stage.node_id for stage in plan(structure(4), nodes, POLICY).stages] == ["b"]


def test_experts_stay_beside_their_router_when_they_fit() -> None:
    model = structure(4, moe_layers={1: 8, 3: 8})
    topology = plan(model, [node("a")], POLICY)

    assert topology.expert_sets == ()
    assert topology.stages[0].experts == {1: tuple(range(8)), 3: tuple(range(8))}


def test_a_layer_whose_experts_fit_on_no_node_is_spread() -> None:
    model = structure(2, moe_layers={1: 8}, layer_bytes=MIB // 4)
    nodes = [node(name, 6 * MIB) for name in "abc"]

    topology = plan(model, nodes, POLICY)

    assert_whole(topology, model, nodes)
    holders = {chosen.node_id for chosen in topology.expert_sets} | {topology.stage_of(1).node_id}
    assert len(holders) >= 2


def test_too_little_room_says_how_many_bytes_are_missing_and_for_what() -> None:
    with pytest.raises(InsufficientCapacity, match=r"weights.*KV of 2 sequences.*\d+ bytes are missing"):
        plan(structure(40), [node("a", 8 * MIB), node("b", 8 * MIB)], POLICY)


def test_a_layer_larger_than_every_node_is_named_as_the_reason() -> None:
    model = structure(2, layer_bytes=20 * MIB)
    with pytest.raises(InsufficientCapacity, match="bytes are missing on the largest node"):
        plan(model, [node(name, 16 * MIB) for name in "abcd"], POLICY)


def test_no_node_at_all_is_too_little_room() -> None:
    with pytest.raises(InsufficientCapacity, match="0 live nodes"):
        plan(structure(4), [], POLICY)


def test_the_price_per_token_follows_from_the_layers() -> None:
    assert plan(structure(5), [node("a")], POLICY).prediction.lamports_per_token == 10


speeds = st.sampled_from([1e9, 3e9, 1e10, 1e11])
nodes_of_all_kinds = st.lists(
    st.builds(lambda mib, bandwidth: (mib * MIB, bandwidth), st.integers(min_value=1, max_value=40), speeds),
    min_size=1,
    max_size=8,
).map(
    lambda sizes: [
        node(f"n{index}", size, memory_bytes_per_s=speed) for index, (size, speed) in enumerate(sizes)
    ]
)
models = st.builds(
    lambda layers, every, experts: structure(
        layers, moe_layers={i: experts for i in range(layers) if every and i % every == 1}
    ),
    st.integers(min_value=1, max_value=12),
    st.integers(min_value=0, max_value=3),
    st.integers(min_value=1, max_value=8),
)


@settings(deadline=None, max_examples=150)
@given(model=models, nodes=nodes_of_all_kinds, shuffle=st.randoms(use_true_random=False))
def test_every_plan_is_whole_within_memory_and_repeatable(model, nodes, shuffle) -> None:
    try:
        topology = plan(model, nodes, POLICY)
    except InsufficientCapacity:
        return
    assert_whole(topology, model, nodes)
    shuffled = list(nodes)
    shuffle.shuffle(shuffled)
    assert plan(model, shuffled, POLICY) == topology


@settings(deadline=None, max_examples=150)
@given(
    layers=st.integers(min_value=1, max_value=12),
    nodes=nodes_of_all_kinds,
    mib=st.integers(min_value=1, max_value=40),
    speed=speeds,
)
def test_one_more_node_never_makes_a_dense_route_slower(layers, nodes, mib, speed) -> None:
    model = structure(layers)
    try:
        before = plan(model, nodes, POLICY)
    except InsufficientCapacity:
        return
    after = plan(model, [*nodes, node("n99", mib * MIB, memory_bytes_per_s=speed)], POLICY)

    assert after.prediction.tokens_per_s >= before.prediction.tokens_per_s * (1 - 1e-9)


@pytest.mark.prove
def test_a_thousand_nodes_and_256_experts_are_planned_in_two_seconds() -> None:
    model = structure(
        61, moe_layers=dict.fromkeys(range(3, 61), 256), layer_bytes=100 * MIB, expert_bytes=40 * MIB
    )
    nodes = [
        node(f"n{index:04}", (8 + index % 5 * 8) * GIB, memory_bytes_per_s=1e11 * (1 + index % 7))
        for index in range(1000)
    ]

    started = time.perf_counter()
    topology = plan(model, nodes, POLICY)
    seconds = time.perf_counter() - started

    assert_whole(topology, model, nodes)
    assert seconds <= 2, seconds
