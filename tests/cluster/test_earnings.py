"""What owners earned for what they lent decides whose nodes come next."""

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.cluster.earnings import OwnersEarnings
from azu.errors import InvalidRequest
from azu.planner.fairness import fair_plan, fairer_placement
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node, NodeState
from azu.units import GIB, MIB
from tests.builders import node, structure

HOUR_S, DAY_S = 3600, 86_400
POLICY = PlanPolicy(promised_sequences=1, tokens_per_sequence=128, activation_tokens=64, hop_s=1e-4)


def owned(name: str, gib: float = 1.0, **given: object) -> Node:
    return node(name, int(gib * GIB), payout_address=name, **given)


def lent(nodes: list[Node], until_s: int, *, every_s: int = 600, earned: OwnersEarnings | None = None):
    earned = OwnersEarnings() if earned is None else earned
    for now_s in range(0, until_s + 1, every_s):
        earned.lend(nodes, now_s)
    return earned


@pytest.mark.parametrize("num_layers", [4, 40])
def test_of_ten_equal_nodes_none_earns_less_than_half_the_mean_of_a_week(num_layers: int) -> None:
    """A model of one node, or of several, earns the same each hour; where it is better placed is looked at
    every four hours."""
    model = structure(num_layers, layer_bytes=64 * MIB)
    nodes = [owned(f"owner-{index}") for index in range(10)]
    earned, total = OwnersEarnings(), dict.fromkeys((one.payout_address for one in nodes), 0)
    placed = fair_plan(model, nodes, POLICY, {})
    assert (len(placed.stages) > 1) == (num_layers == 40)
    for hour in range(7 * 24):
        for look in range(6):
            earned.lend(nodes, hour * HOUR_S + look * 600)
        shares = {stage.node_id: 1000 * len(stage.span) for stage in placed.stages}
        earned.earn(shares)
        for owner, lamports in shares.items():
            total[owner] += lamports
        if hour % 4 == 0:
            change = fairer_placement(model, placed, nodes, POLICY, earned.rates(nodes))
            placed = placed if change is None else change.topology

    mean = sum(total.values()) / len(total)
    assert min(total.values()) >= mean / 2, total


def test_an_owner_who_lends_and_does_not_earn_falls_behind_the_mean() -> None:
    nodes = [owned("ada"), owned("ben")]
    earned = lent(nodes, DAY_S)
    earned.earn({"ada": 10_000})
    rates = earned.rates(nodes)

    assert rates["ben"] < earned.mean < rates["ada"]


def test_a_new_address_counts_as_average_and_gains_nothing() -> None:
    nodes = [owned("ada"), owned("ben")]
    earned = lent(nodes, DAY_S)
    earned.earn({"ada": 10_000, "new": 10_000})
    rates = earned.rates([*nodes, owned("new")])

    assert rates["ben"] < rates["new"] < rates["ada"]
    assert rates["new"] == pytest.approx(earned.mean)


def test_who_lends_twice_as_much_has_to_earn_twice_as_much() -> None:
    nodes = [owned("ada", 2), owned("ben", 0.5), replace(owned("ben", 0.5), node_id="ben-2")]
    earned = lent(nodes, DAY_S)
    earned.earn({"ada": 2_000, "ben": 1_000})
    rates = earned.rates(nodes)

    assert rates["ada"] == pytest.approx(rates["ben"])


@pytest.mark.parametrize("state", [NodeState.LEAVING, NodeState.SUSPECT])
def test_a_node_that_takes_no_pieces_does_not_lend(state: NodeState) -> None:
    earned = lent([owned("ada"), owned("ben", state=state)], DAY_S)
    earned.earn({"ada": 100, "ben": 100})

    assert earned.by_owner.keys() == {"ada"}


@pytest.mark.parametrize(("free_mib", "used_mib", "gib"), [(1024, 0, 1), (256, 256, 0.5), (1024, 512, 1)])
def test_what_its_owner_uses_itself_is_not_lent(free_mib: int, used_mib: int, gib: float) -> None:
    ada = owned("ada", vram_free_bytes=free_mib * MIB, vram_used_bytes=used_mib * MIB)
    earned = lent([ada], 600)

    assert earned.by_owner["ada"].gib_h == pytest.approx(gib / 6)


def test_an_owner_who_lends_nothing_has_no_rate() -> None:
    nodes = [owned("ada"), owned("ben", 0)]

    assert lent(nodes, HOUR_S).rates(nodes).keys() == {"ada"}


# What a node may say: also what no device has.
_NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 64 * MIB, GIB, 2**50, 2**64, 10**400]), st.floats(allow_nan=True)
)


@given(numbers=st.tuples(*[_NUMBERS] * 7))
def test_no_number_of_a_node_ends_a_plan(numbers: tuple[float, ...]) -> None:
    names = (
        "vram_total_bytes", "vram_free_bytes", "vram_used_bytes", "vram_other_bytes", "memory_bytes_per_s",
        "flops_per_s", "load",
    )  # fmt: skip
    liar = replace(owned("liar"), **dict(zip(names, numbers, strict=True)))
    nodes = [owned("ada"), owned("ben")]
    with suppress(InvalidRequest):
        nodes.append(liar.checked(GIB))
    earned = lent(nodes, HOUR_S)
    earned.earn({"ada": 5, "ben": 3})

    assert fair_plan(structure(4), nodes, POLICY, earned.rates(nodes)).stages


def test_old_sums_count_less_each_day_and_are_forgotten_in_the_end() -> None:
    earned = lent([owned("ada")], DAY_S)
    earned.earn({"ada": 1_000})
    before = earned.mean
    earned.lend([owned("ben")], 3 * DAY_S)

    assert earned.by_owner["ada"].lamports == pytest.approx(500)
    assert earned.mean == pytest.approx(before, rel=0.05), "what was lent counts less by as much"
    earned.lend([owned("ben")], 60 * DAY_S)
    assert earned.by_owner.keys() == {"ben"}


def test_of_a_time_without_a_look_only_ten_minutes_count() -> None:
    earned = OwnersEarnings()
    earned.lend([owned("ada")], 0)
    earned.lend([owned("ada")], DAY_S)

    assert earned.by_owner["ada"].gib_h == pytest.approx(1 / 6)


def test_the_next_scheduler_goes_on_with_the_sums_by_its_own_clock() -> None:
    earned = lent([owned("ada")], DAY_S)
    earned.earn({"ada": 1_000})
    after = OwnersEarnings.from_json(earned.to_json())
    assert after.by_owner == earned.by_owner
    after.lend([owned("ada")], 5)

    assert after.mean == earned.mean
    assert OwnersEarnings.from_json("{").by_owner == {}
