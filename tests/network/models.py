"""Models of other families for the test network: random weights, the built-in models' tokenizer."""

import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from tests.engine.families import build_lively
from tests.models.questions import built_in_folder

VOCAB_SIZE = 1024
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LAYERED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **_ENDS,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}


def _of(model_type: str, **settings: object) -> Callable[[], PreTrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **settings)


# One dense, one alibi, one with learned positions, one with latents, two of experts.
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": _of("qwen2", **_LAYERED | {"intermediate_size": 768}),
    "bloom": _of("bloom", vocab_size=VOCAB_SIZE, hidden_size=96, n_layer=6, n_head=4, **_ENDS),
    "gpt2": _of(
        "gpt2", vocab_size=VOCAB_SIZE, n_positions=256, n_embd=96, n_layer=6, n_head=4, **_ENDS
    ),
    "deepseek_v2": _of(
        "deepseek_v2",
        **_LAYERED | _EXPERTS | {"num_key_value_heads": 4},
        n_routed_experts=8,
        n_shared_experts=1,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    ),
    "mixtral": _of(
        "mixtral", **_LAYERED | {"intermediate_size": 96}, num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen3_moe": _of("qwen3_moe", **_LAYERED | _EXPERTS, num_experts=8, head_dim=32),
}  # fmt: skip


def save_with_tokenizer(folder: Path, family: str) -> Path:
    """Write a family's model as an ordinary Hugging Face folder with a tokenizer."""
    build_lively(MODELS[family]()).save_pretrained(folder)
    return save_tokenizer(folder)


def save_tokenizer(folder: Path) -> Path:
    """Put the built-in models' tokenizer beside a model."""
    for file in built_in_folder("azu/tiny-dense").glob("token*"):
        shutil.copy(file, folder)
    return folder
