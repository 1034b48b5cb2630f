"""A node that lost room gets back what the rule says: KV in whole blocks, and the rest is named."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from azu.planner.kv_blocks import KvReduction, Placed, blocks_again, shrink_orders, with_blocks
from azu.units import MIB
from tests.builders import node, structure, topology

KV = 16 * 1024  # bytes of a block of 16 tokens in one layer


def placed(
    spans: dict[str, tuple[int, int]], *, vram_bytes: int = 4 * MIB, model_id: str = "test/model"
) -> Placed:
    """Return a model of 4 layers and 16 blocks that keeps at least 4 of them."""
    shown = replace(topology(spans, vram_bytes=vram_bytes), model_id=model_id)
    return Placed(structure(4, model_id=model_id), shown, least_blocks=4, most_blocks=16)


def test_nothing_is_given_back_while_everything_fits() -> None:
    assert shrink_orders([placed({"a": (0, 4)})], [node("a", 4 * MIB, vram_used_bytes=0)]) == ()


def test_an_owner_who_lends_less_gets_it_back_in_whole_blocks() -> None:
    (order,) = shrink_orders(
        [placed({"a": (0, 2), "b": (2, 4)})], [node("a", 4 * MIB - 3 * 2 * KV + 1), node("b")]
    )

    assert order == KvReduction("test/model", "r1", num_blocks=13, missing_bytes=0)


def test_another_program_on_the_card_takes_from_what_is_not_loaded_yet() -> None:
    """Of 4 MiB placed half is loaded; another program leaves only 2 MiB - 32 KiB free."""
    report = node("a", 8 * MIB, vram_free_bytes=2 * MIB - 2 * KV, vram_used_bytes=2 * MIB)
    (order,) = shrink_orders([placed({"a": (0, 2)})], [report])

    assert order.num_blocks == 15


def test_the_node_that_lacks_most_decides_for_all_stages() -> None:
    nodes = [node("a", 4 * MIB - 2 * KV), node("b", 4 * MIB - 10 * KV)]
    (order,) = shrink_orders([placed({"a": (0, 2), "b": (2, 4)})], nodes)

    assert order.num_blocks == 11


def test_what_no_kv_can_give_back_is_named_so_that_layers_move() -> None:
    (order,) = shrink_orders([placed({"a": (0, 4)})], [node("a", 2 * MIB)])

    assert order.num_blocks == 4
    assert order.missing_bytes == 2 * MIB - 12 * 4 * KV


def test_models_on_one_node_give_in_proportion_and_others_nothing() -> None:
    models = [
        placed({"a": (0, 1)}, model_id="small"),
        placed({"a": (0, 3)}, model_id="large"),
        placed({"b": (0, 4)}, model_id="elsewhere"),
    ]
    orders = shrink_orders(models, [node("a", 8 * MIB - 4 * 4 * KV), node("b", 4 * MIB)])

    assert [(order.model_id, order.num_blocks) for order in orders] == [("small", 12), ("large", 12)]


@settings(deadline=None)
@given(
    lent=st.integers(0, 12 * MIB),
    free=st.integers(0, 12 * MIB),
    used=st.none() | st.integers(0, 8 * MIB),
    cuts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_after_the_orders_everything_fits_or_the_missing_bytes_say_why(lent, free, used, cuts) -> None:
    models = [placed({"a": (0, cut), "b": (cut, 4)}, model_id=str(index)) for index, cut in enumerate(cuts)]
    report = node("a", lent, vram_free_bytes=min(free, lent), vram_used_bytes=used)
    orders = {order.model_id: order for order in shrink_orders(models, [report])}
    needed = sum(one.topology.vram_bytes_by_node["a"] for one in models)
    given_back = sum(
        (16 - orders[str(index)].num_blocks) * cut * KV
        for index, cut in enumerate(cuts)
        if str(index) in orders
    )
    missing = max((order.missing_bytes for order in orders.values()), default=0)

    assert report.room_bytes(needed) + given_back + missing >= 0
    assert all(4 <= order.num_blocks <= 16 for order in orders.values())
    if report.room_bytes(needed) >= 0:
        assert not orders


def shrunk(one: Placed, num_blocks: int) -> Placed:
    return replace(one, topology=with_blocks(one.structure, one.topology, num_blocks))


def test_a_stage_that_gave_blocks_back_takes_so_much_less() -> None:
    model = placed({"a": (0, 1), "b": (1, 4)})

    less = shrunk(model, 10).topology

    assert [4 * MIB - stage.vram_bytes for stage in less.stages] == [6 * KV, 6 * 3 * KV]
    assert shrink_orders([shrunk(model, 10)], [node("a", 4 * MIB - 6 * KV), node("b", 4 * MIB)]) == ()


def test_blocks_come_back_with_the_room_as_many_as_were_planned() -> None:
    model = shrunk(placed({"a": (0, 2), "b": (2, 4)}), 6)
    low = 4 * MIB - 10 * 2 * KV

    assert blocks_again([model], [node("a", low), node("b")]) == (6,)
    assert blocks_again([model], [node("a", low + 7 * 2 * KV), node("b")]) == (13,)
    assert blocks_again([model], [node("a"), node("b")]) == (16,)
    assert blocks_again([model], [node("a")]) == (6,), "a node that says nothing has no room"


def test_a_little_room_is_not_worth_a_change_unless_it_is_all_that_lacks() -> None:
    spans = {"a": (0, 4)}
    at = lambda num_blocks, more: blocks_again(  # noqa: E731
        [shrunk(placed(spans), num_blocks)], [node("a", 4 * MIB - (16 - num_blocks - more) * 4 * KV)]
    )

    assert at(8, 3) == (8,)
    assert at(8, 4) == (12,)
    assert at(14, 2) == (16,)


def test_models_that_lack_blocks_share_what_a_node_has_again() -> None:
    models = [shrunk(placed({"a": (0, 4)}, model_id=name), 8) for name in ("one", "two")]
    models.append(placed({"a": (0, 4)}, model_id="three"))

    used = sum(one.topology.vram_bytes_by_node["a"] for one in models)

    assert blocks_again(models, [node("a", used + 8 * 4 * KV)]) == (12, 12, 16)
