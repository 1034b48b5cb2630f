"""A job is told in figures how far the start or the repair of its model is."""

from dataclasses import replace

import pytest

from azu.cluster.phases import on_nodes, on_the_head
from azu.models.status import ModelState, ModelStatus
from azu.protocol.phase import answering, queued, reading
from azu.protocol.topology import ExpertSet, Stage
from azu.units import MIB
from tests.builders import node, structure, topology

MODEL = structure(4, moe_layers={3: 2})
PLACED = replace(
    topology({"a": (0, 2), "b": (2, 4)}), expert_sets=(ExpertSet(0, "b", {3: (0, 1)}, 1),)
)  # 2 + 3 + 2 shards of a MiB each
LAYERS = {shard.name: shard.sha256 for shard in MODEL.shards}


@pytest.mark.parametrize(
    ("state", "name", "text"),
    [
        (ModelState.UNKNOWN, "describing", "Looking at the files of m/one."),
        (ModelState.DESCRIBED, "describing", "Looking at the files of m/one."),
        (ModelState.FETCHING, "fetching", "Downloading m/one: 1.0 MiB of 4.0 MiB."),
        (ModelState.CUTTING, "fetching", "Cutting m/one into shards: 1.0 MiB of 4.0 MiB."),
        (ModelState.READY, "loading", "Looking for room for m/one."),
    ],
)
def test_a_model_without_places_is_as_far_as_its_files_are(state: ModelState, name: str, text: str) -> None:
    found = on_the_head(ModelStatus("m/one", "r1", state, MIB, 4 * MIB))

    assert (found.name, found.text) == (name, text)


def test_shards_come_to_their_nodes_before_the_parts_come_up() -> None:
    nodes = {"a": node("a", cached_shards=frozenset(LAYERS.values())), "b": node("b")}

    first = on_nodes(MODEL, PLACED, nodes, set(), is_repair=False)
    assert first.text == "Fetching shards: 3 of 8, 3.0 MiB of 8.0 MiB."
    assert (first.name, first.done, first.total) == ("fetching", 3, 8)
    assert (first.bytes_done, first.bytes_total) == (3 * MIB, 8 * MIB)

    nodes["b"] = replace(nodes["a"], node_id="b")
    later = on_nodes(MODEL, PLACED, nodes, {(Stage, 0), (ExpertSet, 0)}, is_repair=False)
    assert (later.name, later.text) == ("loading", "Loading test/model: 2 of 3 parts are up.")


def test_what_runs_counts_as_fetched_during_a_repair_whatever_its_node_reported() -> None:
    found = on_nodes(MODEL, PLACED, {}, {(Stage, 0), (Stage, 1)}, is_repair=True)

    assert found.name == "recovering"
    assert (found.done, found.total, found.bytes_done, found.bytes_total) == (2, 3, 6 * MIB, 8 * MIB)


def test_texts_have_figures_that_people_read() -> None:
    texts = [one.text for one in (queued(0), queued(1), queued(1200), reading(512, 2000), answering(7, 1024))]

    assert texts == [
        "Waiting for room in the KV cache.",
        "Waiting for room in the KV cache behind 1 other.",
        "Waiting for room in the KV cache behind 1,200 others.",
        "Reading the prompt: 512 of 2,000 tokens.",
        "Answering: 7 of at most 1,024 tokens.",
    ]
