"""Pieces move only when the gain exceeds the cost of their start, which is known before."""

from dataclasses import replace

import pytest

from azu.planner.migration import better_placement, change_between, cold_start_s, have_room, is_worth_moving
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, PieceSet, Topology
from azu.units import MIB
from tests.builders import node, structure, topology

POLICY = PlanPolicy(
    promised_sequences=1, tokens_per_sequence=128, activation_tokens=64,
    fetch_bytes_per_s=MIB, load_bytes_per_s=2 * MIB, horizon_s=100, least_gain=0.1,
)  # fmt: skip
MODEL = structure(4)
ALL = frozenset(shard.sha256 for shard in MODEL.shards)


def on(name: str, nodes: list[Node]) -> Topology:
    """Return the plan that uses one node alone."""
    return plan(MODEL, [one for one in nodes if one.node_id == name], POLICY)


def test_a_cold_start_fetches_missing_shards_and_loads_all() -> None:
    """Four layers, embedding and head are 6 MiB."""
    cold, warm = node("a"), node("b", cached_shards=ALL)

    assert cold_start_s(MODEL, on("a", [cold]), [cold], POLICY) == pytest.approx(6 + 3)
    assert cold_start_s(MODEL, on("b", [warm]), [warm], POLICY) == pytest.approx(3)


def test_nodes_start_in_parallel() -> None:
    nodes = [node("a", 5 * MIB), node("b", 5 * MIB)]
    topology = plan(MODEL, nodes, POLICY)
    sizes = [len(stage.span) + 1 for stage in topology.stages]  # each has an edge

    assert len(sizes) == 2
    assert cold_start_s(MODEL, topology, nodes, POLICY) == pytest.approx(1.5 * max(sizes))


def test_pieces_that_stay_cost_nothing() -> None:
    nodes = [node("a"), node("b")]
    there = on("a", nodes)

    assert cold_start_s(MODEL, there, nodes, POLICY, current=there) == 0
    assert cold_start_s(MODEL, on("b", nodes), nodes, POLICY, current=there) > 0


def test_a_cold_start_counts_experts_on_their_own_nodes() -> None:
    model = structure(1, moe_layers={0: 8})
    nodes = [node("a", 10 * MIB), node("b", 4 * MIB)]
    topology = plan(model, nodes, POLICY)

    assert [chosen.experts for chosen in topology.expert_sets] == [{0: (6, 7)}]
    # embedding, head, router and six experts on one node
    assert cold_start_s(model, topology, nodes, POLICY) == pytest.approx(1.5 * 9)


def moves(model: Structure, gain: float, *, cached: bool = True, policy: PlanPolicy = POLICY) -> bool:
    """Return whether a move to a node `gain` times as fast is worth it; frames cost nothing here."""
    policy = replace(policy, hop_s=1e-12)
    shards = ALL if cached else frozenset()
    nodes = [
        node("a", memory_bytes_per_s=1e7, flops_per_s=1e15),
        node("b", memory_bytes_per_s=gain * 1e7, flops_per_s=1e15, cached_shards=shards),
    ]
    return is_worth_moving(model, on("a", nodes), on("b", nodes), nodes, policy)


def test_a_move_is_worth_it_when_it_pays_back_with_the_least_gain_on_top() -> None:
    # Loading takes 3 of 100 s, fetching 6 more; the least gain is 10%.
    assert not moves(MODEL, 1.0)
    assert not moves(MODEL, 1.1)
    assert moves(MODEL, 1.2)
    assert not moves(MODEL, 1.2, cached=False)
    assert moves(MODEL, 1.3, cached=False)
    assert not moves(MODEL, 1.3, cached=False, policy=replace(POLICY, horizon_s=20))
    assert not moves(MODEL, 100.0, cached=False, policy=replace(POLICY, horizon_s=5))


def test_a_move_to_the_same_place_is_never_worth_it() -> None:
    nodes = [node("a")]
    here = on("a", nodes)

    assert not is_worth_moving(MODEL, here, here, nodes, POLICY)
    assert not is_worth_moving(MODEL, here, here, nodes, replace(POLICY, least_gain=0.0))


def test_no_two_placements_are_each_worth_moving_to_from_the_other() -> None:
    for gain in (0.5, 0.9, 1.1, 2.0):
        nodes = [node("a"), node("b", memory_bytes_per_s=gain * 1e10)]
        there = is_worth_moving(MODEL, on("a", nodes), on("b", nodes), nodes, POLICY)
        back = is_worth_moving(MODEL, on("b", nodes), on("a", nodes), nodes, POLICY)
        assert not (there and back)


SLOW, FAST = 1e7, 1e8  # bytes a second; frames cost little beside that


def place(nodes: list[Node]) -> dict[str, tuple[int, int]] | None:
    """Return the better placement of a model on two slow nodes, or None when it stays."""
    here = plan(MODEL, [one for one in nodes if one.node_id in "ab"], POLICY)
    assert [stage.node_id for stage in here.stages] == ["a", "b"]
    change = better_placement(MODEL, here, nodes, POLICY)
    if change is None:
        return None
    return {one.node_id: (one.span.start, one.span.end) for one in change.topology.stages}


@pytest.mark.parametrize(
    ("joins", "expected"),
    [
        pytest.param([], None, id="none"),
        pytest.param([node("c", 64 * MIB, memory_bytes_per_s=FAST)], {"c": (0, 4)}, id="large and fast"),
        pytest.param(
            [node("c", 5 * MIB, memory_bytes_per_s=FAST)], {"c": (0, 3), "a": (3, 4)}, id="small and fast"
        ),
        pytest.param([node("c", 5 * MIB, memory_bytes_per_s=SLOW)], None, id="no faster"),
        pytest.param([node("c", 5 * MIB, memory_bytes_per_s=SLOW * 1.1)], None, id="hardly faster"),
        pytest.param([node("c", MIB, memory_bytes_per_s=FAST)], None, id="too small"),
        pytest.param(
            [node("c", memory_bytes_per_s=FAST, state=NodeState.SUSPECT)], None, id="not trusted yet"
        ),
    ],
)
def test_a_node_that_joins_is_used_when_that_pays(joins, expected) -> None:
    slow = [node(name, 5 * MIB, memory_bytes_per_s=SLOW) for name in "ab"]
    found = place([*slow, *joins])

    assert found is None if expected is None else found is not None and found.keys() == expected.keys()


def test_a_model_on_a_node_without_a_report_does_not_move() -> None:
    fast = node("c", memory_bytes_per_s=FAST)
    assert better_placement(MODEL, topology({"gone": (0, 4)}), [fast], POLICY) is None


def test_a_change_has_only_the_pieces_that_do_not_stay() -> None:
    before = topology({"a": (0, 2), "b": (2, 3), "c": (3, 4)})

    same = change_between(before, replace(before, epoch=2))
    moved = change_between(before, topology({"a": (0, 2), "d": (2, 3), "c": (3, 4)}))
    shorter = change_between(before, topology({"a": (0, 2), "b": (2, 4)}))

    assert (same.gone, same.fresh) == (PieceSet(), PieceSet())
    assert (moved.gone, moved.fresh) == (PieceSet(frozenset({1})), PieceSet(frozenset({1})))
    assert moved.fresh_bytes == {"d": MIB}
    assert (shorter.gone, shorter.fresh) == (PieceSet(frozenset({1, 2})), PieceSet(frozenset({1})))


def test_expert_sets_that_stay_keep_their_indices() -> None:
    def with_sets(**experts: tuple[int, ...]) -> Topology:
        sets = tuple(
            ExpertSet(index, name, {1: ids}, MIB) for index, (name, ids) in enumerate(experts.items())
        )
        return replace(topology({"a": (0, 4)}), expert_sets=sets)

    change = change_between(with_sets(c=(0, 1), d=(2, 3)), with_sets(b=(0,), d=(2, 3), e=(1,)))

    assert {(one.node_id, one.index) for one in change.topology.expert_sets} == {("d", 1), ("b", 0), ("e", 2)}
    assert change.gone == PieceSet(expert_sets=frozenset({0}))
    assert change.fresh == PieceSet(expert_sets=frozenset({0, 2}))


def test_fresh_pieces_have_to_fit_on_each_node() -> None:
    nodes = [node("a", 2 * MIB), node("b", 2 * MIB, state=NodeState.LEAVING)]

    assert have_room({}, nodes)
    assert have_room({"a": 2 * MIB}, nodes)
    assert not have_room({"a": 2 * MIB + 1}, nodes)
    assert not have_room({"b": MIB}, nodes)
    assert not have_room({"z": MIB}, nodes)
