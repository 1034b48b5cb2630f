"""A node that lost room gets back what the rule says: KV in whole blocks, and the rest is named."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from azu.planner.shrink import Placed, ShrinkOrder, shrink_orders
from azu.units import MIB
from tests.builders import node, structure, topology

KV = 16 * 1024  # bytes of a block of 16 tokens in one layer


def placed(
    spans: dict[str, tuple[int, int]], *, vram_bytes: int = 4 * MIB, model_id: str = "test/model"
) -> Placed:
    """Return a model of 4 layers and 16 blocks that keeps at least 4 of them."""
    shown = replace(topology(spans, vram_bytes=vram_bytes), model_id=model_id)
    return Placed(structure(4, model_id=model_id), shown, least_blocks=4)


def test_nothing_is_given_back_while_everything_fits() -> None:
    assert shrink_orders([placed({"a": (0, 4)})], [node("a", 4 * MIB, vram_used_bytes=0)]) == ()


def test_an_owner_who_lends_less_gets_it_back_in_whole_blocks() -> None:
    (order,) = shrink_orders(
        [placed({"a": (0, 2), "b": (2, 4)})], [node("a", 4 * MIB - 3 * 2 * KV + 1), node("b")]
    )

    assert order == ShrinkOrder("test/model", "r1", num_blocks=13, missing_bytes=0)


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
