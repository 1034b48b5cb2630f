"""A model in which some tokens lead to values that its dtype does not hold, and no others do."""

import torch
from transformers import PreTrainedModel

# A token -> the layer in which it exceeds the dtype, and its own place in the hidden state.
OVERFLOWS = {5: (0, 63), 6: (3, 62)}
# What the layer multiplies twice: the square exceeds the dtype.
WEIGHTS = {torch.float16: 60.0, torch.float32: 1e19}


def make_overflow(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change a model of the llama family so that each of OVERFLOWS exceeds a dtype in its layer."""
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        for token, (layer, place) in OVERFLOWS.items():
            embedding[:, place] = 0
            for block in model.model.layers:
                block.self_attn.o_proj.weight[place] = 0
                block.mlp.down_proj.weight[place] = 0
            embedding[token] = 0
            embedding[token, place] = 30_000
            model.model.layers[layer].mlp.gate_proj.weight[:, place] = WEIGHTS[dtype]
            model.model.layers[layer].mlp.up_proj.weight[:, place] = WEIGHTS[dtype]
    return model.to(dtype)
