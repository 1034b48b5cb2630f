"""Pieces move only when that pays back, and what it costs to bring them up is known before."""

from dataclasses import replace

import pytest

from azu.planner.moves import cold_start_s, worth_moving
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology
from azu.units import MIB
from tests.builders import node, structure

POLICY = PlanPolicy(
    promised_sequences=1, tokens_per_sequence=128, activation_tokens=64,
    fetch_bytes_per_s=MIB, load_bytes_per_s=2 * MIB, horizon_s=100, least_gain=0.1,
)  # fmt: skip
MODEL = structure(4)
ALL = frozenset(shard.sha256 for shard in MODEL.shards)


def on(name: str, nodes: list[Node]) -> Topology:
    """Return the plan that uses one node alone."""
    return plan(MODEL, [one for one in nodes if one.node_id == name], POLICY)


def test_a_cold_start_fetches_what_is_not_on_disk_and_loads_all() -> None:
    """4 layers, embedding and head: 6 MiB."""
    cold, warm = node("a"), node("b", cached_shards=ALL)

    assert cold_start_s(MODEL, on("a", [cold]), [cold], POLICY) == pytest.approx(6 + 3)
    assert cold_start_s(MODEL, on("b", [warm]), [warm], POLICY) == pytest.approx(3)


def test_nodes_start_side_by_side() -> None:
    nodes = [node("a", 5 * MIB), node("b", 5 * MIB)]
    topology = plan(MODEL, nodes, POLICY)
    sizes = [len(stage.span) + 1 for stage in topology.stages]  # each has an edge

    assert len(sizes) == 2
    assert cold_start_s(MODEL, topology, nodes, POLICY) == pytest.approx(1.5 * max(sizes))


def test_pieces_that_stay_where_they_are_cost_nothing() -> None:
    nodes = [node("a"), node("b")]
    there = on("a", nodes)

    assert cold_start_s(MODEL, there, nodes, POLICY, current=there) == 0
    assert cold_start_s(MODEL, on("b", nodes), nodes, POLICY, current=there) > 0


def test_a_cold_start_counts_experts_where_they_are() -> None:
    model = structure(1, moe_layers={0: 8})
    nodes = [node("a", 10 * MIB), node("b", 4 * MIB)]
    topology = plan(model, nodes, POLICY)

    assert [chosen.experts for chosen in topology.expert_sets] == [{0: (6, 7)}]
    # embedding, head, router and six experts on one node
    assert cold_start_s(model, topology, nodes, POLICY) == pytest.approx(1.5 * 9)


def moves(model: Structure, gain: float, *, cached: bool = True, policy: PlanPolicy = POLICY) -> bool:
    """Say whether a move to a node `gain` times as fast is worth it; frames cost nothing here."""
    policy = replace(policy, hop_s=1e-12)
    shards = ALL if cached else frozenset()
    nodes = [
        node("a", memory_bytes_per_s=1e7, flops_per_s=1e15),
        node("b", memory_bytes_per_s=gain * 1e7, flops_per_s=1e15, cached_shards=shards),
    ]
    return worth_moving(model, on("a", nodes), on("b", nodes), nodes, policy)


def test_a_move_is_worth_it_when_it_pays_back_with_something_on_top() -> None:
    # Loading takes 3 of 100 s, fetching 6 more; 10% are wanted on top.
    assert not moves(MODEL, 1.0)
    assert not moves(MODEL, 1.1)
    assert moves(MODEL, 1.2)
    assert not moves(MODEL, 1.2, cached=False)
    assert moves(MODEL, 1.3, cached=False)
    assert not moves(MODEL, 1.3, cached=False, policy=replace(POLICY, horizon_s=20))
    assert not moves(MODEL, 100.0, cached=False, policy=replace(POLICY, horizon_s=5))


def test_to_stay_is_never_worth_a_move() -> None:
    nodes = [node("a")]
    here = on("a", nodes)

    assert not worth_moving(MODEL, here, here, nodes, POLICY)
    assert not worth_moving(MODEL, here, here, nodes, replace(POLICY, least_gain=0.0))


def test_no_two_placements_are_each_worth_moving_to_from_the_other() -> None:
    for gain in (0.5, 0.9, 1.1, 2.0):
        nodes = [node("a"), node("b", memory_bytes_per_s=gain * 1e10)]
        there = worth_moving(MODEL, on("a", nodes), on("b", nodes), nodes, POLICY)
        back = worth_moving(MODEL, on("b", nodes), on("a", nodes), nodes, POLICY)
        assert not (there and back)
