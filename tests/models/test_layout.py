"""Each tensor of a checkpoint goes into its shard; an incomplete checkpoint is refused."""

from pathlib import Path

import pytest
import torch

from azu.errors import BrokenCheckpoint, UnsupportedModel
from azu.models import describe
from azu.models.config_json import read_config
from azu.models.layout import ShardPlan, plan_shards
from azu.models.skeleton import build_skeleton
from tests.models.checkpoints import (
    VOCABULARY,
    change_config,
    cut_checkpoint,
    load_checkpoint,
    reassemble,
    save_checkpoint,
    store_checkpoint,
)

HIDDEN = 32


def plan(folder: Path) -> tuple[dict[str, ShardPlan], bool]:
    shards, tied_head = plan_shards(folder, describe(folder))
    return {shard.name: shard for shard in shards}, tied_head


def names(folder: Path) -> dict[str, set[str]]:
    return {name: set(shard.tensors) for name, shard in plan(folder)[0].items()}


def without(folder: Path, *removed: str) -> None:
    tensors = load_checkpoint(folder)
    store_checkpoint(folder, {name: tensor for name, tensor in tensors.items() if name not in removed})


def test_a_dense_model_has_a_shard_per_layer_and_one_per_edge(tmp_path):
    shards = names(save_checkpoint(tmp_path, "llama"))
    assert list(shards) == ["embed", "layer_0_dense", "layer_1_dense", "layer_2_dense", "head"]
    assert shards["embed"] == {"model.embed_tokens.weight"}
    assert shards["head"] == {"model.norm.weight", "lm_head.weight"}
    assert all(name.startswith("model.layers.1.") for name in shards["layer_1_dense"])


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_a_moe_layer_has_a_shard_for_its_router_and_one_per_expert(tmp_path, family):
    folder = save_checkpoint(tmp_path, family)
    shards = names(folder)
    moe = {"layer_1_router", *(f"layer_1_expert_{expert}" for expert in range(4))}
    assert {name for name in shards if name.startswith("layer_1_")} == moe
    dense_first = family in ("qwen2_moe", "deepseek_v3")
    assert ("layer_0_dense" in shards) == dense_first
    assert not any("experts." in name.replace("shared_experts.", "") for name in shards["layer_1_router"])


def test_shared_experts_and_gates_stay_with_the_router(tmp_path):
    shards = names(save_checkpoint(tmp_path, "qwen2_moe"))
    assert {
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.shared_expert.up_proj.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
        "model.layers.1.self_attn.q_proj.weight",
    } <= shards["layer_1_router"]
    assert shards["layer_1_expert_2"] == {
        f"model.layers.1.mlp.experts.2.{name}_proj.weight" for name in ("gate", "up", "down")
    }


def test_a_fused_expert_tensor_is_sliced_under_its_own_name(tmp_path):
    folder = save_checkpoint(tmp_path, "gpt_oss")
    shards, _ = plan(folder)
    fused = load_checkpoint(folder)["model.layers.2.mlp.experts.gate_up_proj"]
    info = shards["layer_2_expert_3"].tensors["model.layers.2.mlp.experts.gate_up_proj"]
    assert info.shape == (1, *fused.shape[1:])


def test_active_parameters_are_those_that_one_token_uses(tmp_path):
    folder = save_checkpoint(tmp_path, "qwen2_moe")
    shards, _ = plan(folder)
    model = build_skeleton(read_config(folder))
    assert shards["embed"].active_parameters == HIDDEN
    assert shards["head"].active_parameters == HIDDEN + VOCABULARY * HIDDEN
    for index, layer in enumerate(model.model.layers):
        found = [shard for name, shard in shards.items() if name.startswith(f"layer_{index}_")]
        total = sum(parameter.numel() for parameter in layer.parameters())
        assert sum(shard.active_parameters for shard in found) == total
    experts = list(model.model.layers[1].mlp.experts.parameters())
    assert shards["layer_1_expert_0"].active_parameters == sum(one[0].numel() for one in experts)


def test_the_active_parameters_of_a_tied_head_include_the_embedding(tmp_path):
    shards, tied_head = plan(save_checkpoint(tmp_path, "gpt2"))
    assert tied_head
    assert set(shards["head"].tensors) == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert shards["head"].active_parameters == 2 * HIDDEN + VOCABULARY * HIDDEN
    assert shards["embed"].active_parameters == 2 * HIDDEN  # one row of words, one of positions


def test_names_without_the_models_prefix_are_mapped_and_kept(tmp_path):
    folder = save_checkpoint(tmp_path, "gpt2")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_checkpoint(folder).items()}
    store_checkpoint(folder, bare)
    shards = names(folder)
    assert shards["embed"] == {"wte.weight", "wpe.weight"}
    assert "h.1.attn.c_attn.weight" in shards["layer_1_dense"]
    structure = cut_checkpoint(folder, tmp_path / "out")
    assert reassemble(tmp_path / "out", structure).keys() == bare.keys()


def test_a_copy_of_the_tied_embedding_is_left_out(tmp_path):
    folder = save_checkpoint(tmp_path, "gpt2")
    tensors = load_checkpoint(folder)
    store_checkpoint(folder, tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()})
    shards, tied_head = plan(folder)
    assert tied_head
    assert "lm_head.weight" not in shards["head"].tensors


def test_a_head_that_differs_from_the_embedding_is_not_tied_despite_the_config(tmp_path):
    folder = save_checkpoint(tmp_path, "gpt2")
    tensors = load_checkpoint(folder)
    store_checkpoint(folder, tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    shards, tied_head = plan(folder)
    assert not tied_head
    assert "lm_head.weight" in shards["head"].tensors
    assert shards["head"].active_parameters == 2 * HIDDEN + VOCABULARY * HIDDEN


def test_a_tied_weight_stored_only_as_the_head_becomes_the_embedding(tmp_path):
    folder = save_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_checkpoint(folder)
    weight = tensors.pop("model.embed_tokens.weight")
    store_checkpoint(folder, tensors | {"lm_head.weight": weight})
    structure = cut_checkpoint(folder, tmp_path / "out")
    assert structure.tied_head
    assert set(structure.shard("embed").tensors) == {"model.embed_tokens.weight"}
    assert torch.equal(reassemble(tmp_path / "out", structure)["model.embed_tokens.weight"], weight)


def test_layers_beyond_those_of_the_config_and_old_buffers_are_ignored(tmp_path):
    folder = save_checkpoint(tmp_path, "deepseek_v3")
    expected = names(folder)
    tensors = load_checkpoint(folder)
    extra = {
        name.replace(".layers.2.", ".layers.3."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.2." in name
    }
    extra["model.layers.3.eh_proj.weight"] = torch.ones(HIDDEN, 2 * HIDDEN)
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), float("inf"))
    store_checkpoint(folder, tensors | extra)
    assert names(folder) == expected
    cut_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "removed", "missed"),
    [
        ("llama", "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        ("llama", "model.norm.weight", "model.norm.weight"),
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("llama", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("gpt2", "transformer.wte.weight", "transformer.wte.weight"),
        (
            "qwen2_moe",
            "model.layers.1.mlp.experts.2.up_proj.weight",
            "model.layers.1.mlp.experts.gate_up_proj",
        ),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.0.w2.weight",
            "model.layers.1.mlp.experts.down_proj",
        ),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_the_error_names_a_missing_tensor(tmp_path, family, removed, missed):
    folder = save_checkpoint(tmp_path, family)
    without(folder, removed)
    with pytest.raises(BrokenCheckpoint) as caught:
        plan(folder)
    assert missed in caught.value.message
    assert caught.value.message.startswith("model.safetensors")


def test_a_missing_expert_is_an_error(tmp_path):
    folder = save_checkpoint(tmp_path, "qwen2_moe")
    without(folder, *(f"model.layers.2.mlp.experts.1.{name}_proj.weight" for name in ("gate", "up", "down")))
    with pytest.raises(BrokenCheckpoint, match=r"model\.layers\.2\.mlp\.experts"):
        plan(folder)


def test_experts_with_a_number_past_the_last_are_refused(tmp_path):
    folder = save_checkpoint(tmp_path, "qwen2_moe")
    tensors = load_checkpoint(folder)
    store_checkpoint(
        folder,
        {name.replace("layers.1.mlp.experts.3", "layers.1.mlp.experts.7"): t for name, t in tensors.items()},
    )
    with pytest.raises(BrokenCheckpoint, match="layer_1_expert_7"):
        plan(folder)


def test_the_error_names_a_tensor_of_another_shape(tmp_path):
    folder = save_checkpoint(tmp_path, "llama")
    tensors = load_checkpoint(folder)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, HIDDEN)
    store_checkpoint(folder, tensors)
    with pytest.raises(BrokenCheckpoint, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        plan(folder)


def test_a_config_of_more_layers_than_the_checkpoint_has_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, "llama")
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(BrokenCheckpoint, match=r"model\.layers\.3\."):
        plan(folder)


def test_quantised_weights_are_refused(tmp_path):
    folder = save_checkpoint(tmp_path, "llama")
    tensors = load_checkpoint(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    store_checkpoint(folder, tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedModel, match="F8_E4M3"):
        plan(folder)
    store_checkpoint(folder, tensors | {name: tensors[name].to(torch.int32)})
    with pytest.raises(BrokenCheckpoint, match="int32"):
        plan(folder)


def test_the_layout_is_planned_without_reading_weights(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path, "qwen2_moe")
    monkeypatch.setattr("os.preadv", lambda *args: pytest.fail("read a weight"))
    plan(folder)
