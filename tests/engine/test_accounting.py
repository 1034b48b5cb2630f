"""Work: counted at the node that ran it, or estimated when its record is lost."""

import pytest

from azu.engine import accounting
from azu.engine.accounting import WorkAccount
from azu.planner.plan import plan
from azu.planner.replicas import with_hot_replicas
from azu.protocol.step import ExpertWork
from azu.protocol.topology import Topology
from azu.units import MIB
from tests.builders import node, structure
from tests.planner.test_plan import POLICY

DENSE = structure(4)
MOE = structure(1, moe_layers={0: 8})
NODES = [node("r", 10 * MIB, memory_bytes_per_s=1e12), node("a", 4 * MIB)]


def test_the_estimate_for_a_dense_model_is_the_counted_work() -> None:
    account = WorkAccount(DENSE, plan(DENSE, [node("a", 5 * MIB), node("b", 5 * MIB)], POLICY))
    estimated = account.estimated(5, 3)
    account.add_tokens(1, 7)

    assert estimated == account.close(1)
    assert {node_id for layer in estimated.values() for node_id in layer} == {"a", "b"}


def test_the_estimate_for_no_tokens_is_no_work() -> None:
    account = WorkAccount(DENSE, plan(DENSE, [node("a")], POLICY))
    assert not any(sum(layer.values()) for layer in account.estimated(5, 0).values())


def test_the_estimate_gives_holders_of_experts_their_part_and_replicas_nothing() -> None:
    topology: Topology = plan(MOE, NODES, POLICY)
    (apart,) = topology.expert_sets
    assert (apart.node_id, len(apart.experts[0])) == ("a", 2)
    whole = WorkAccount(MOE, plan(MOE, [node("r")], POLICY)).estimated(4, 1)[0]["r"]
    distributed = WorkAccount(MOE, topology).estimated(4, 1)[0]

    expert = MOE.layers[0].experts_per_token * MOE.expert_shard(0, 0).active_parameters * MOE.dtype_bytes
    assert distributed["a"] == 4 * (expert * 2 // 8)
    assert sum(distributed.values()) == whole

    replicated = with_hot_replicas(MOE, topology, [node("b", 8 * MIB)], POLICY, {(0, 7): 9.0})
    assert replicated.replicas
    assert WorkAccount(MOE, replicated).estimated(4, 1)[0] == distributed


def test_what_is_taken_back_of_sequences_and_not_asked_for_is_kept_of_the_latest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accounting, "_KEPT_SEQUENCES", 3)
    account = WorkAccount(MOE, plan(MOE, NODES, POLICY))
    for sequence in range(5):
        account.add_expert_work(sequence, (ExpertWork(0, 0, {sequence: 4}),), {sequence})
    for one in account.take_reported():
        assert list(account.compare(one, {0: {}})), "the expert set got nothing"

    assert [bool(account.taken_back(sequence)) for sequence in range(5)] == [False] * 2 + [True] * 3
