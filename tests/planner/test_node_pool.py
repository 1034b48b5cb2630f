"""Measured links count: neighbours in a pipeline are near each other, and no plan is lost for it."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.errors import InsufficientCapacity
from azu.planner.node_pool import link_matrix, link_s
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.planner.prediction import predict
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.units import MIB
from tests.builders import node, structure
from tests.planner.exhaustive import best_tokens_per_s
from tests.planner.steps import count_calls
from tests.planner.test_plan import (
    POLICY,
    assert_whole,
    large_model,
    mebibytes,
    models,
    random_nodes,
    speeds,
)

FAR_S = 0.05
links = st.sampled_from([0.0001, 0.002, 0.02, FAR_S])


def linked(nodes: list[Node], links_s: dict[tuple[str, str], float]) -> list[Node]:
    """Return the nodes with links that the first of each pair measured."""
    return [
        replace(one, links_s={b: link for (a, b), link in links_s.items() if a == one.node_id})
        for one in nodes
    ]


def test_a_link_is_the_measurement_of_either_side_and_at_least_the_policys_hop() -> None:
    a, b = linked([node("a"), node("b")], {("a", "b"): 0.02})

    assert link_s(a, b, 0.001) == link_s(b, a, 0.001) == 0.02
    assert link_s(a, b, 0.5) == 0.5
    assert link_s(a, node("c"), 0.001) == 0.001
    assert link_matrix([a, b], 0.5) is None
    matrix = link_matrix([a, b], 0.001)
    assert matrix is not None
    assert matrix.tolist() == [[0.001, 0.02], [0.02, 0.001]]


def test_a_pipeline_uses_nodes_that_are_near_each_other() -> None:
    """Two houses have two nodes each; one house alone holds the model; ids are mixed."""
    near = {"a": "west", "b": "east", "c": "west", "d": "east"}
    far = {(a, b): FAR_S for a in near for b in near if near[a] != near[b]}
    nodes = linked([node(name, 5 * MIB) for name in near], far)

    stages = plan(structure(6), nodes, POLICY).stages

    assert len(stages) == 2
    assert len({near[stage.node_id] for stage in stages}) == 1


def test_a_pipeline_that_needs_both_houses_has_one_link_between_them() -> None:
    near = {"a": "west", "b": "east", "c": "west", "d": "east"}
    far = {(a, b): FAR_S for a in near for b in near if near[a] != near[b]}
    nodes = linked([node(name, 5 * MIB) for name in near], far)

    houses = [near[stage.node_id] for stage in plan(structure(12), nodes, POLICY).stages]

    assert len(houses) == 4
    assert sum(one != other for one, other in pairwise(houses)) == 1


def test_experts_apart_prefer_the_node_nearest_to_their_router() -> None:
    model = structure(1, moe_layers={0: 8})
    router = node("r", 10 * MIB, memory_bytes_per_s=1e12)
    nodes = linked([router, node("a", 6 * MIB), node("b", 6 * MIB)], {("r", "a"): FAR_S, ("r", "b"): 0.002})

    topology = plan(model, nodes, POLICY)

    assert [chosen.node_id for chosen in topology.expert_sets] == ["b"]
    assert topology.prediction.time_per_output_token_s >= 2 * 0.002


def test_the_prediction_in_a_plan_is_the_prediction_for_its_topology() -> None:
    nodes = linked([node(name, 5 * MIB) for name in "abc"], {("a", "b"): 0.01, ("b", "c"): 0.02})
    model = structure(6)
    topology = plan(model, nodes, POLICY)

    assert predict(model, topology, nodes, POLICY) == topology.prediction
    slower = [replace(one, memory_bytes_per_s=one.memory_bytes_per_s / 10) for one in nodes]
    assert predict(model, topology, slower, POLICY).tokens_per_s < topology.prediction.tokens_per_s


@st.composite
def linked_networks(draw: st.DrawFn, most: int = 7) -> list[Node]:
    sizes = draw(st.lists(st.tuples(mebibytes, speeds), min_size=1, max_size=most))
    nodes = [
        node(f"n{index}", size * MIB, memory_bytes_per_s=speed) for index, (size, speed) in enumerate(sizes)
    ]
    pairs = [(a.node_id, b.node_id) for a in nodes for b in nodes if a.node_id < b.node_id]
    return linked(nodes, {pair: draw(links) for pair in pairs})


dense_models = st.builds(structure, st.integers(min_value=1, max_value=12))


@settings(deadline=None, max_examples=100)
@given(model=models, nodes=linked_networks(), shuffle=st.randoms(use_true_random=False))
def test_every_plan_over_measured_links_is_whole_and_repeatable(model, nodes, shuffle) -> None:
    try:
        topology = plan(model, nodes, POLICY)
    except InsufficientCapacity:
        return
    assert_whole(topology, model, nodes)
    shuffled = list(nodes)
    shuffle.shuffle(shuffled)
    assert plan(model, shuffled, POLICY) == topology


@settings(deadline=None, max_examples=150)
@given(model=dense_models, nodes=linked_networks(), newcomer=st.integers(min_value=0, max_value=6))
def test_one_more_node_with_its_links_never_makes_the_predicted_speed_worse(model, nodes, newcomer) -> None:
    others = [one for index, one in enumerate(nodes) if index != newcomer % len(nodes)]
    try:
        before = plan(model, others, POLICY)
    except InsufficientCapacity:
        return
    after = plan(model, nodes, POLICY)

    assert after.prediction.tokens_per_s >= before.prediction.tokens_per_s * (1 - 1e-9)


def random_links(seed: int) -> tuple[Structure, list[Node]]:
    draw = random.Random(seed)
    names = [f"n{index}" for index in range(draw.randint(2, 5))]
    nodes = [
        node(name, draw.randint(3, 9) * MIB, memory_bytes_per_s=draw.choice([1e9, 3e9, 1e10]))
        for name in names
    ]
    pairs = {(a, b): draw.choice([0.0005, 0.004, 0.03]) for a in names for b in names if a < b}
    return structure(draw.randint(2, 8)), linked(nodes, pairs)


def test_routes_over_measured_links_are_near_those_of_an_exhaustive_search() -> None:
    equal = total = 0
    for seed in range(150):
        model, nodes = random_links(seed)
        best = best_tokens_per_s(model, nodes, POLICY)
        try:
            found = plan(model, nodes, POLICY).prediction.tokens_per_s
        except InsufficientCapacity:
            continue
        assert best is not None
        assert best / 2.5 <= found <= best * (1 + 1e-9)
        total += 1
        equal += found >= best * (1 - 1e-9)
    assert total >= 50
    assert equal >= total * 0.9, (equal, total)


@pytest.mark.prove
def test_a_thousand_nodes_with_measured_links_are_planned_in_a_bounded_number_of_steps() -> None:
    draw = random.Random(1)
    model, nodes = large_model(), random_nodes(draw, 1000)
    names = [one.node_id for one in nodes]
    links_s = {
        (name, other): draw.uniform(0.001, FAR_S) for name in names for other in draw.sample(names, 32)
    }
    nodes = linked(nodes, links_s)

    policy = PlanPolicy(promised_sequences=2, tokens_per_sequence=128)
    topology, calls = count_calls(lambda: plan(model, nodes, policy))

    assert_whole(topology, model, nodes)
    assert calls <= 500_000  # about 90,000 for the experts, and 270 for each node with its links
