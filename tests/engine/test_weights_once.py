"""A stage's weights are in memory once: after packing or copying, their file is no longer mapped."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from azu.engine.local import local_topology
from azu.engine.stage import build_stage
from azu.engine.weights import can_pack
from azu.models import describe
from azu.models.cut import cut
from tests.engine.conftest import CutModel
from tests.engine.families import FAMILIES, build_lively

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="this build of torch has no oneDNN"
)


def mapped_shards(folder: Path) -> set[str]:
    """Return the names of a folder's shards that this process maps now."""
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(rf"{re.escape(str(folder))}/(\S+)\.safetensors", maps))


@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "gpt2", "opt", "mixtral", "gpt_oss", "deepseek_v3"]
)
def test_only_embeddings_stay_mapped(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]().to_dict()
    wide = {"hidden_size": 256, "n_embd": 256, "intermediate_size": 512, "moe_intermediate_size": 512}
    few = {"num_hidden_layers": 2, "n_layer": 2, "layer_types": None}
    changes = {name: value for name, value in (wide | few).items() if name in config}
    if not family.startswith("deepseek"):  # these configs give the widths of their heads
        changes["head_dim"] = 64
    source, shards = tmp_path / "model", tmp_path / "shards"
    build_lively(AutoConfig.for_model(**config | changes)).save_pretrained(source)
    structure = cut(source, shards, model_id=family, revision="r1", architecture=describe(source))
    paths = {shard.name: shards / shard.file_name for shard in structure.shards}

    stages = [
        build_stage(structure, stage.span, stage.experts, paths, shards, torch.device("cpu"))
        for stage in local_topology(structure, (0, 1, 2)).stages
    ]

    assert mapped_shards(shards) <= {"embed"}
    del stages


def test_a_model_too_small_to_pack_stays_mapped(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("qwen3")  # no other test of this process maps it
    stage = local_topology(model.structure, (0, 2, 6)).stages[1]

    built = build_stage(
        model.structure, stage.span, stage.experts, model.paths(), model.shards, torch.device("cpu")
    )

    assert mapped_shards(model.shards) == {"head", *(f"layer_{layer}_dense" for layer in range(2, 6))}
    del built
