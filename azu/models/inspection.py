"""Describe the model of a config.json: its layers, its sizes, and how it can be cut."""

from pathlib import Path

from transformers import PreTrainedConfig

from azu.models.config_json import read_config
from azu.models.description import Architecture
from azu.models.skeleton import build_skeleton, experts_in, find_layers, serving_dtype
from azu.models.trace import trace
from azu.protocol.structure import Layer, LayerKind

# Configs have several names for the longest sequence of a model; models with ALiBi often have none.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_DEFAULT_CONTEXT_LENGTH = 2048


def describe(config_folder: Path) -> Architecture:
    """Return the architecture that config.json describes; no weight is downloaded or allocated.

    Raises UnsupportedModel with the reason when the model cannot be cut by layers, BrokenCheckpoint when
    config.json is malformed.
    """
    config = read_config(config_folder)
    model = build_skeleton(config)
    # The experts are counted before the trace, which replaces them.
    experts = [experts_in(layer) for layer in model.get_submodule(find_layers(model).path).children()]
    traced = trace(model)
    text = config.get_text_config(decoder=True)
    dtype = serving_dtype(config)
    layers = tuple(
        Layer(
            index=index,
            kind=LayerKind.MOE if found else LayerKind.DENSE,
            kv_bytes_per_token=traced.kv_values[index] * dtype.itemsize,
            num_experts=found.num_experts if found else 0,
            experts_per_token=traced.experts_per_token[index],
        )
        for index, found in enumerate(experts)
    )
    return Architecture(
        name=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        hidden_size=traced.hidden_size,
        vocab_size=text.vocab_size,
        context_length=_context_length(text),
        layers=layers,
        layers_path=traced.layers.path,
        front=traced.front,
        back=traced.back,
        restart_length=_restart_length(text),
        unused=traced.unused,
    )


def _context_length(text: PreTrainedConfig) -> int:
    lengths = (getattr(text, key, None) for key in _CONTEXT_KEYS)
    return next(
        (length for length in lengths if isinstance(length, int) and length > 0), _DEFAULT_CONTEXT_LENGTH
    )


def _restart_length(text: PreTrainedConfig) -> int | None:
    """Return the length beyond which longrope rescales all positions, or None without longrope."""
    parameters = getattr(text, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    length = parameters["original_max_position_embeddings"]
    assert isinstance(length, int)
    return length
