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
from azu.protocol.structure import Structure
from azu.units import GIB, MIB
from tests.builders import node, structure
from tests.few import few

HOUR_S, DAY_S = 3600, 86_400
POLICY = PlanPolicy(promised_sequences=1, tokens_per_sequence=128, activation_tokens=64, hop_s=1e-4)


def owned(name: str, gib: float = 1.0, **given: object) -> Node:
    return node(name, int(gib * GIB), payout_address=name, **given)


def lent(nodes: list[Node], until_s: int, *, every_s: int = 600, earned: OwnersEarnings | None = None):
    earned = OwnersEarnings() if earned is None else earned
    for now_s in range(0, until_s + 1, every_s):
        earned.lend(nodes, now_s)
    return earned


def earned_in_a_week(model: Structure, nodes: list[Node], *, renames: bool = False) -> dict[str, int]:
    """Return what each node earned while a model earned the same each hour, and was looked at every four
    hours. From the second day on the first node's owner `renames` itself when it is above the mean."""
    earned, total = OwnersEarnings(), dict.fromkeys((one.node_id for one in nodes), 0)
    placed = fair_plan(model, nodes, POLICY, {})
    assert (len(placed.stages) > 1) == (model.num_layers == 40)
    for hour in range(7 * 24):
        for look in range(6):
            earned.lend(nodes, hour * HOUR_S + look * 600)
        owners = {one.node_id: one.payout_address for one in nodes}
        shares = {stage.node_id: 1000 * len(stage.span) for stage in placed.stages}
        earned.earn({owners[node_id]: lamports for node_id, lamports in shares.items()})
        for node_id, lamports in shares.items():
            total[node_id] += lamports
        if hour % 4 == 0:
            rates = earned.rates(nodes)
            if renames and hour >= 24 and rates[nodes[0].payout_address] > earned.mean:
                nodes = [replace(nodes[0], payout_address=f"name-{hour}"), *nodes[1:]]
                rates = earned.rates(nodes)
            change = fairer_placement(model, placed, nodes, POLICY, rates)
            placed = placed if change is None else change.topology
    return total


@pytest.mark.parametrize("num_layers", few([4, 40]))
def test_of_ten_equal_nodes_none_earns_less_than_half_the_mean_of_a_week(num_layers: int) -> None:
    """The model needs one node, or several."""
    model = structure(num_layers, layer_bytes=64 * MIB)
    total = earned_in_a_week(model, [owned(f"owner-{index}") for index in range(10)])

    assert min(total.values()) >= sum(total.values()) / len(total) / 2, total


@pytest.mark.parametrize("num_layers", few([4, 40]))
def test_an_owner_with_a_new_name_each_time_it_earned_more_than_the_mean_earns_no_more(
    num_layers: int,
) -> None:
    model = structure(num_layers, layer_bytes=64 * MIB)
    total = earned_in_a_week(model, [owned(f"owner-{index}") for index in range(10)], renames=True)

    assert total["owner-0"] <= sum(total.values()) / len(total), total


def test_an_owner_who_lends_and_does_not_earn_falls_behind_the_mean() -> None:
    nodes = [owned("ada"), owned("ben")]
    earned = lent(nodes, DAY_S)
    earned.earn({"ada": 10_000})
    rates = earned.rates(nodes)

    assert rates["ben"] < earned.mean < rates["ada"]


def test_a_new_address_comes_behind_the_old_ones_until_it_has_lent_for_a_day() -> None:
    nodes, new = [owned("ada"), owned("ben")], owned("new")
    earned = lent(nodes, 2 * DAY_S)
    earned.earn({"ada": 10_000, "new": 10_000})
    rates = earned.rates([*nodes, new])
    assert rates["ben"] < rates["ada"] == rates["new"]

    def after(hours: int, gib: float) -> dict[str, float]:
        """Return the rates once the new address has lent one GiB for some hours, and lends `gib` then."""
        later = OwnersEarnings.from_json(earned.to_json())
        lent([*nodes, new], hours * HOUR_S, earned=later)
        return later.rates([*nodes, owned("new", gib)])

    assert after(12, 1)["new"] == after(12, 1)["ada"]
    assert after(30, 1)["new"] < after(30, 1)["ada"]
    assert after(30, 2)["new"] == after(30, 2)["ada"], "who lends little for a day is not known for more"


def test_who_lends_for_a_few_hours_each_day_is_not_new_for_ever() -> None:
    nodes, sometimes = [owned("ada"), owned("ben")], owned("sometimes")
    earned = OwnersEarnings()
    for hour in range(14 * 24):
        for look in range(6):
            earned.lend([*nodes, sometimes] if hour % 24 < 4 else nodes, hour * HOUR_S + look * 600)
    earned.earn({"ada": 10_000})

    rates = earned.rates([*nodes, sometimes])
    assert rates["sometimes"] < rates["ada"]


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
