"""The shapes of the built-in models: about a million float32 parameters each, 4 MiB with all files."""

from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2MoeConfig

from tests.training.tokenizer import CONTEXT_LENGTH

FOLDERS = {"dense": "tiny-dense", "moe": "tiny-moe"}


def build_config(kind: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """Return the config of the "dense" or the "moe" model."""
    common = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "float32",
    }
    if kind == "dense":
        return LlamaConfig(hidden_size=128, intermediate_size=224, tie_word_embeddings=True, **common)
    return Qwen2MoeConfig(
        hidden_size=96,
        intermediate_size=160,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
        norm_topk_prob=True,
        # Layers 0 and 3 are dense: they are neither all at the front nor in a regular pattern.
        decoder_sparse_step=1,
        mlp_only_layers=[0, 3],
        tie_word_embeddings=False,
        **common,
    )
