"""Owners of equal nodes earn about the same, and a model is nowhere slow for it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from azu.planner.fairness import fair_plan, fairer_placement
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology
from azu.units import MIB
from tests.builders import OWNERS, node, structure

POLICY = PlanPolicy(promised_sequences=1, tokens_per_sequence=128, activation_tokens=64, hop_s=1e-4)
MODEL = structure(12, layer_bytes=4 * MIB)
ROOM = 64 * MIB


def owned(owner: int, *, vram_bytes: int = ROOM, **given: object) -> Node:
    return node(f"n{owner}", vram_bytes, payout_address=OWNERS[owner], **given)


def used(found: Topology) -> set[str]:
    return set(found.vram_bytes_by_node)


def test_of_equal_nodes_that_of_the_owner_who_earned_least_comes_first() -> None:
    nodes = [owned(0), owned(1), owned(2)]

    assert used(plan(MODEL, nodes, POLICY)) == {"n0"}
    assert used(fair_plan(MODEL, nodes, POLICY, {OWNERS[0]: 3.0, OWNERS[1]: 2.0, OWNERS[2]: 1.0})) == {"n2"}
    assert used(fair_plan(MODEL, nodes, POLICY, {OWNERS[0]: 1.0})) == {"n1"}, (
        "a tie goes to the lower address"
    )
    assert fair_plan(MODEL, nodes, POLICY, {}) == plan(MODEL, nodes, POLICY)


@pytest.mark.parametrize(("slower", "expected"), [(0.98, "n1"), (0.9, "n0")])
def test_at_most_three_percent_of_the_speed_are_given_up(slower: float, expected: str) -> None:
    speeds = {"memory_bytes_per_s": slower * 1e10, "flops_per_s": slower * 1e11}
    nodes, rates = [owned(0), owned(1, **speeds)], {OWNERS[0]: 1.0}

    assert used(fair_plan(MODEL, nodes, POLICY, rates)) == {expected}


def test_as_many_owners_are_taken_as_the_model_needs_and_no_dead_node() -> None:
    small = MODEL.num_layers * 2 * MIB
    nodes = [owned(index, vram_bytes=small) for index in range(6)]
    nodes[5] = replace(nodes[5], state=NodeState.LEAVING)
    rates = {OWNERS[index]: 6.0 - index for index in range(6)}

    fast = plan(MODEL, nodes, POLICY)
    fair = fair_plan(MODEL, nodes, POLICY, rates)

    assert used(fast) == {"n0", "n1", "n2"}
    assert used(fair) == {"n2", "n3", "n4"}
    assert fair.prediction.tokens_per_s >= 0.97 * fast.prediction.tokens_per_s


def test_a_model_moves_to_owners_who_earned_less_than_half_and_to_no_others() -> None:
    nodes = [owned(0), owned(1)]
    current = plan(MODEL, nodes, POLICY)

    def change(of_this: float, of_the_other: float):
        return fairer_placement(MODEL, current, nodes, POLICY, {OWNERS[0]: of_this, OWNERS[1]: of_the_other})

    assert change(2.0, 1.0) is None
    found = change(2.0, 0.9)
    assert found is not None
    assert used(found.topology) == {"n1"}
    assert found.gone == current.piece_set
    assert fairer_placement(MODEL, current, nodes[1:], POLICY, {}) is None, "its node has no report"


def test_two_nodes_of_one_owner_count_as_one_owner() -> None:
    nodes = [owned(0), owned(1), replace(owned(1), node_id="n1b")]
    current = plan(MODEL, nodes[1:2], POLICY)

    assert fairer_placement(MODEL, current, nodes[1:], POLICY, {OWNERS[1]: 5.0}) is None
    assert Counter(used(fair_plan(MODEL, nodes, POLICY, {OWNERS[1]: 5.0}))) == {"n0": 1}


@pytest.mark.parametrize("needed", [1, 3, 6])
def test_no_nodes_are_planned_twice(monkeypatch: pytest.MonkeyPatch, needed: int) -> None:
    planned: list[frozenset[str]] = []

    def noting(structure: Structure, nodes: Sequence[Node], policy: PlanPolicy, *, epoch: int) -> Topology:
        planned.append(frozenset(one.node_id for one in nodes))
        return plan(structure, nodes, policy, epoch=epoch)

    monkeypatch.setattr("azu.planner.fairness.plan", noting)
    nodes = [owned(index, vram_bytes=MODEL.num_layers * 6 * MIB // needed) for index in range(6)]
    fair_plan(MODEL, nodes, POLICY, {OWNERS[index]: 6.0 - index for index in range(6)})

    assert len(planned) == len(set(planned)) > 1
