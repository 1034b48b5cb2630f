"""KV goes back to a node that lost room in whole blocks; what KV cannot give back is reported."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from azu.planner.kv_blocks import Deployed, KvReduction, kv_reductions, restored_num_blocks, with_blocks
from azu.protocol.node import Node
from azu.units import MIB
from tests.builders import node, structure, topology

KV = 16 * 1024  # bytes of a block of 16 tokens in one layer
PLANNED, LEAST = 16, 4  # blocks


def deployed(
    spans: dict[str, tuple[int, int]], *, vram_bytes: int = 4 * MIB, model_id: str = "test/model"
) -> Deployed:
    """Return a model of 4 layers and 16 blocks."""
    placed = replace(topology(spans, vram_bytes=vram_bytes), model_id=model_id)
    return structure(4, model_id=model_id), placed


def reductions(models: Sequence[Deployed], reports: Sequence[Node]) -> tuple[KvReduction, ...]:
    return kv_reductions(models, reports, least_blocks=LEAST)


def restored(models: Sequence[Deployed], reports: Sequence[Node]) -> tuple[int, ...]:
    return restored_num_blocks(models, reports, planned_blocks=PLANNED)


def test_no_pipeline_gives_kv_up_while_everything_fits() -> None:
    assert reductions([deployed({"a": (0, 4)})], [node("a", 4 * MIB, vram_used_bytes=0)]) == ()


def test_an_owner_who_lends_less_gets_memory_back_in_whole_blocks() -> None:
    (reduction,) = reductions(
        [deployed({"a": (0, 2), "b": (2, 4)})], [node("a", 4 * MIB - 3 * 2 * KV + 1), node("b")]
    )

    assert reduction == KvReduction(("test/model", "r1", 0), num_blocks=13, missing_bytes=0)


def test_another_program_on_the_gpu_reduces_the_room_for_what_is_not_loaded_yet() -> None:
    """Of 4 MiB placed half is loaded; another program leaves only 2 MiB - 32 KiB free."""
    report = node("a", 8 * MIB, vram_free_bytes=2 * MIB - 2 * KV, vram_used_bytes=2 * MIB)
    (reduction,) = reductions([deployed({"a": (0, 2)})], [report])

    assert reduction.num_blocks == 15


def test_the_node_that_lacks_most_decides_for_all_stages() -> None:
    nodes = [node("a", 4 * MIB - 2 * KV), node("b", 4 * MIB - 10 * KV)]
    (reduction,) = reductions([deployed({"a": (0, 2), "b": (2, 4)})], nodes)

    assert reduction.num_blocks == 11


def test_bytes_that_kv_cannot_give_back_are_reported_as_missing() -> None:
    (reduction,) = reductions([deployed({"a": (0, 4)})], [node("a", 2 * MIB)])

    assert reduction.num_blocks == 4
    assert reduction.missing_bytes == 2 * MIB - 12 * 4 * KV


def test_models_on_one_node_give_in_proportion_and_models_elsewhere_give_nothing() -> None:
    models = [
        deployed({"a": (0, 1)}, model_id="small"),
        deployed({"a": (0, 3)}, model_id="large"),
        deployed({"b": (0, 4)}, model_id="elsewhere"),
    ]
    found = reductions(models, [node("a", 8 * MIB - 4 * 4 * KV), node("b", 4 * MIB)])

    assert [(one.pipeline[0], one.num_blocks) for one in found] == [("small", 12), ("large", 12)]


@settings(deadline=None)
@given(
    lent=st.integers(0, 12 * MIB),
    free=st.integers(0, 12 * MIB),
    used=st.none() | st.integers(0, 8 * MIB),
    cuts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_after_the_reductions_everything_fits_or_bytes_are_reported_missing(lent, free, used, cuts) -> None:
    models = [deployed({"a": (0, cut), "b": (cut, 4)}, model_id=str(index)) for index, cut in enumerate(cuts)]
    report = node("a", lent, vram_free_bytes=min(free, lent), vram_used_bytes=used)
    found = {one.pipeline[0]: one for one in reductions(models, [report])}
    needed = sum(placed.vram_bytes_by_node["a"] for _, placed in models)
    given_back = sum(
        (16 - found[str(index)].num_blocks) * cut * KV
        for index, cut in enumerate(cuts)
        if str(index) in found
    )
    missing = max((one.missing_bytes for one in found.values()), default=0)

    assert report.room_bytes(needed) + given_back + missing >= 0
    assert all(LEAST <= one.num_blocks <= PLANNED for one in found.values())
    if report.room_bytes(needed) >= 0:
        assert not found


def resized(model: Deployed, num_blocks: int) -> Deployed:
    return model[0], with_blocks(*model, num_blocks)


def test_a_stage_that_gave_blocks_back_takes_less_vram() -> None:
    model = deployed({"a": (0, 1), "b": (1, 4)})

    less = resized(model, 10)[1]

    assert [4 * MIB - stage.vram_bytes for stage in less.stages] == [6 * KV, 6 * 3 * KV]
    assert reductions([resized(model, 10)], [node("a", 4 * MIB - 6 * KV), node("b", 4 * MIB)]) == ()


def test_blocks_come_back_with_the_room_up_to_the_planned_number() -> None:
    model = resized(deployed({"a": (0, 2), "b": (2, 4)}), 6)
    low = 4 * MIB - 10 * 2 * KV

    assert restored([model], [node("a", low), node("b")]) == (6,)
    assert restored([model], [node("a", low + 7 * 2 * KV), node("b")]) == (13,)
    assert restored([model], [node("a"), node("b")]) == (16,)
    assert restored([model], [node("a")]) == (6,), "a node without a report has no room"


def test_a_little_room_is_not_worth_a_change_unless_it_restores_the_planned_number() -> None:
    spans = {"a": (0, 4)}
    at = lambda num_blocks, more: restored(  # noqa: E731
        [resized(deployed(spans), num_blocks)], [node("a", 4 * MIB - (16 - num_blocks - more) * 4 * KV)]
    )

    assert at(8, 3) == (8,)
    assert at(8, 4) == (12,)
    assert at(14, 2) == (16,)


def test_models_that_lack_blocks_share_the_room_of_a_node() -> None:
    models = [resized(deployed({"a": (0, 4)}, model_id=name), 8) for name in ("one", "two")]
    models.append(deployed({"a": (0, 4)}, model_id="three"))

    used = sum(placed.vram_bytes_by_node["a"] for _, placed in models)

    assert restored(models, [node("a", used + 8 * 4 * KV)]) == (12, 12, 16)
