"""Describe the model of a config.json: its layers, its sizes, and how it can be cut."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from azu.models.config_json import eos_token_ids, read_config
from azu.models.description import Architecture
from azu.models.skeleton import build_skeleton, experts_in, find_layers, serving_dtype
from azu.models.trace import Trace, trace
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
    sizes = _Sizes(model)
    ends = eos_token_ids(config_folder, config)
    traced = trace(model)
    text = config.get_text_config(decoder=True)
    dtype = serving_dtype(config)
    layers = tuple(
        Layer(
            index=index,
            kind=LayerKind.MOE if sizes.num_experts[index] else LayerKind.DENSE,
            kv_bytes_per_token=traced.kv_values[index] * dtype.itemsize,
            num_experts=sizes.num_experts[index],
            experts_per_token=traced.experts_per_token[index],
        )
        for index in range(len(sizes.layers))
    )
    front, back = sizes.edges(traced)
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
        tied_head=sizes.tied_head,
        layer_parameters=sizes.layers,
        expert_parameters=sizes.experts,
        embed_parameters=front,
        head_parameters=back,
        eos_token_ids=ends,
        restart_length=_restart_length(text),
        unused=traced.unused,
    )


class _Sizes:
    """Parameter counts of a model before it is traced."""

    def __init__(self, model: PreTrainedModel) -> None:
        listed = find_layers(model)
        decoder = model.get_submodule(listed.decoder_path)
        layers = [layer for _, layer in model.get_submodule(listed.path).named_children()]
        experts = [experts_in(layer) for layer in layers]
        self.layers = tuple(_count(layer) for layer in layers)
        self.num_experts = tuple(found.num_experts if found else 0 for found in experts)
        self.experts = tuple(_count(found.module) // found.num_experts if found else 0 for found in experts)
        self.children: Mapping[str, int] = {
            name: _count(child) for name, child in decoder.named_children() if name != listed.attribute
        }
        self.outside = _count(model) - sum(self.layers) - sum(self.children.values())
        output = model.get_output_embeddings()
        ties = model.all_tied_weights_keys
        self.tied_head = any(model.get_submodule(name.rpartition(".")[0]) is output for name in ties)

    def edges(self, traced: Trace) -> tuple[int, int]:
        """Return the number of parameters before and after the layers; modules at both ends count twice."""
        front = sum(self.children.get(name, 0) for name in traced.front)
        back = sum(self.children.get(name, 0) for name in traced.back)
        return front, back + self.outside


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
