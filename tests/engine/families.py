"""Tiny models of many families, with random weights so large that a mistake changes the tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 97
NUM_LAYERS = 6
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GPT = {
    "vocab_size": VOCAB_SIZE,
    "n_positions": 128,
    "n_embd": 64,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}


def _like_llama(model_type: str, **changes: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **{**_COMMON, **changes})


def _of(model_type: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **settings)


def _falcon(**settings: Any) -> Callable[[], PreTrainedConfig]:
    return _of("falcon", **_HEADS, **settings)


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _like_llama("llama"),
    "llama-tied": _like_llama("llama", tie_word_embeddings=True),
    "llama-rope3": _like_llama(
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": _like_llama("mistral", sliding_window=8),
    "mixtral": _like_llama("mixtral", num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "qwen2": _like_llama("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3),
    "qwen2_moe": _like_llama(
        "qwen2_moe",
        **_EXPERTS,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=2,
        mlp_only_layers=[0],
    ),
    "gpt2": _of("gpt2", **_GPT),
    "gpt_neo": _of(
        "gpt_neo",
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=128,
        hidden_size=64,
        num_layers=NUM_LAYERS,
        attention_types=[[["global", "local"], 3]],
        # Its scores are not scaled: with wide heads its softmax is so sharp that the order of sums matters.
        num_heads=16,
        window_size=8,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gptj": _of("gptj", **_GPT, rotary_dim=8),
    "opt": _of("opt", **_HEADS, ffn_dim=96, word_embed_proj_dim=64),
    "opt-350m": _of("opt", **_HEADS, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False),
    "bloom": _of("bloom", vocab_size=VOCAB_SIZE, hidden_size=64, n_layer=NUM_LAYERS, n_head=4),
    "falcon-7b": _falcon(
        multi_query=True, parallel_attn=True, new_decoder_architecture=False, alibi=False, bias=False
    ),
    "falcon-40b": _falcon(num_kv_heads=2, new_decoder_architecture=True, alibi=False, bias=False),
    "falcon-rw": _falcon(
        multi_query=False, parallel_attn=False, new_decoder_architecture=False, alibi=True, bias=True
    ),
    "mpt": _of(
        "mpt",
        vocab_size=VOCAB_SIZE,
        d_model=64,
        n_layers=NUM_LAYERS,
        n_heads=4,
        max_seq_len=128,
        expansion_ratio=2,
    ),
    "phi": _like_llama("phi", partial_rotary_factor=0.5),
    "phi3": _like_llama("phi3", sliding_window=8),
    "phi3-longrope": _like_llama(
        "phi3",
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
        },
    ),
    # Dynamic NTK changes no position within the length that the config names. Here a prompt reaches it.
    "llama-dynamic": _like_llama(
        "llama",
        max_position_embeddings=31,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "gemma": _like_llama("gemma", head_dim=16),
    "gemma2": _like_llama("gemma2", head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3_text": _like_llama(
        "gemma3_text",
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
    ),
    "starcoder2": _like_llama("starcoder2", sliding_window=8),
    "qwen3": _like_llama("qwen3", head_dim=16),
    "qwen3_moe": _like_llama("qwen3_moe", head_dim=16, **_EXPERTS),
    "gpt_oss": _like_llama(
        "gpt_oss",
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters=None,
    ),
    "deepseek_v2": _like_llama("deepseek_v2", **_LATENT, n_group=1, topk_group=1, topk_method="greedy"),
    "deepseek_v3": _like_llama("deepseek_v3", **_LATENT, n_group=2, topk_group=1),
}
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")


def build_model(family: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a tiny model of a family; each call returns the same weights."""
    return build_lively(FAMILIES[family](), dtype=dtype)


def build_lively(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model of a config with random weights, so large that every token changes the result."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_lively(name, parameter, generator))
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.to(dtype)


def save_model(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model of a family as an ordinary Hugging Face folder."""
    build_model(family, dtype=dtype).save_pretrained(folder)
    return folder


def _lively(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() >= 2:
        is_table = any(word in name for word in ("embed", "wte", "wpe"))
        return noise * (0.7 if is_table else 1.6 / parameter.shape[-1] ** 0.5)
    return noise * 0.1 if "bias" in name or "sinks" in name else parameter + noise * 0.1
