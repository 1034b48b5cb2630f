"""Tiny random checkpoints of several families, as transformers saves them, and shards joined again."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from azu.models import describe
from azu.models.cut import cut
from azu.protocol.structure import Structure

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_FAMILIES: dict[str, dict[str, object]] = {
    "llama": _SIZES,
    "gpt2": {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4},
    # Experts one by one in the file, dense layers in between.
    "qwen2_moe": _SIZES
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "mixtral": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    # All experts of a layer in one tensor.
    "gpt_oss": _SIZES
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rope_parameters": None},
    "granitemoe": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    # A router bias that stays in float32.
    "deepseek_v3": _SIZES
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
}
FAMILIES = tuple(_FAMILIES)
MODEL_ID = "test/model"
REVISION = "0" * 40


def save_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    **changes: object,
) -> Path:
    """Save a random model, over several files with an index when `shard_size` is small."""
    torch.manual_seed(0)
    given = {key: value for key, value in (_FAMILIES[family] | changes).items() if value is not None}
    config = AutoConfig.for_model(family, **given)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor in a folder's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def store_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace a folder's weights by one file."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    """Change entries of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def cut_checkpoint(folder: Path, out: Path) -> Structure:
    """Cut a checkpoint under the default ids."""
    return cut(folder, out, model_id=MODEL_ID, revision=REVISION, architecture=describe(folder))


def reassemble(out: Path, structure: Structure) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors from its shards, fused experts joined in their order."""
    parts: dict[str, list[torch.Tensor]] = {}
    for shard in structure.shards:
        for name, tensor in load_file(out / shard.file_name).items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(found) if len(found) > 1 else found[0] for name, found in parts.items()}
