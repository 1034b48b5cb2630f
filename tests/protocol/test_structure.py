"""structure.json describes a model completely, and any other content is refused."""

import json

import pytest

from azu.errors import BrokenCheckpoint
from azu.protocol.structure import Structure
from tests.builders import structure


def test_a_structure_is_the_same_after_writing_and_reading() -> None:
    model = structure(4, moe_layers={1: 8})

    assert Structure.from_json(model.to_json()) == model


def test_shards_are_found_by_layer_expert_and_edge() -> None:
    model = structure(4, moe_layers={1: 8})

    assert model.layer_shard(0).name == "layer_0_dense"
    assert model.layer_shard(1).file_name == "layer_1_router.safetensors"
    assert model.expert_shard(1, 7).name == "layer_1_expert_7"
    assert [shard.name for shard in model.edge_shards(0, 2)] == ["embed"]
    assert [shard.name for shard in model.edge_shards(2, 4)] == ["head"]
    assert [shard.name for shard in model.edge_shards(1, 2)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 7},
        {"unknown": 1},
        {"shards": [{"name": "embed"}]},
        {"hidden_size": "64"},
        {"version": None},
        {"version": 2},
        {"dtype": "int4"},
        {"context_length": 0},
        {"layers": []},
        {"shards": []},
        {"files": [{"name": "../../etc/passwd", "size_bytes": 1, "sha256": "0" * 64}]},
    ],
)
def test_a_wrong_field_is_refused_and_the_file_named(change: dict[str, object]) -> None:
    content = json.loads(structure().to_json()) | change

    with pytest.raises(BrokenCheckpoint, match=r"here/structure\.json"):
        Structure.from_json(json.dumps(content), where="here/structure.json")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../../etc/shadow"},
        {"name": "layer_0_dense/../../x"},
        {"name": "head"},
        {"size_bytes": -1},
        {"size_bytes": 2**62},
        {"sha256": "0" * 63},
        {"sha256": "../" * 21 + "0"},
    ],
)
def test_a_shard_with_a_foreign_path_or_an_impossible_size_is_refused(change: dict[str, object]) -> None:
    content = json.loads(structure().to_json())
    content["shards"][2] |= change

    with pytest.raises(BrokenCheckpoint):
        Structure.from_json(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        {"index": 3},
        {"num_experts": 0},
        {"num_experts": 2**40},
        {"experts_per_token": 9},
        {"kind": "dense"},
        {"kv_bytes_per_token": -5},
    ],
)
def test_layers_that_contradict_their_shards_are_refused(change: dict[str, object]) -> None:
    content = json.loads(structure(4, moe_layers={1: 8}).to_json())
    content["layers"][1] |= change

    with pytest.raises(BrokenCheckpoint):
        Structure.from_json(json.dumps(content))


def test_content_that_is_not_json_is_refused() -> None:
    with pytest.raises(BrokenCheckpoint):
        Structure.from_json(b"\x80\x04pickle")
