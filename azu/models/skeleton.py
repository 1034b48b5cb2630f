"""Build the whole model on the meta device, without memory for weights; find its layers and experts."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from azu.errors import AzuError, BrokenCheckpoint, UnsupportedModel, plain_reason
from azu.models.compat import is_experts_module
from azu.models.slim import without_compiler

SERVED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class LayerList:
    """The place of a model's decoder layers: child `attribute` of the module at `decoder_path`."""

    decoder_path: str
    attribute: str

    @property
    def path(self) -> str:
        """The list's dotted path, such as "model.layers"."""
        return f"{self.decoder_path}.{self.attribute}".lstrip(".")


def build_skeleton(
    config: PreTrainedConfig, *, dtype: torch.dtype | None = None, attention: str = "eager"
) -> PreTrainedModel:
    """Return the model of a config on the meta device, in `dtype` or else the config's own.

    `attention` names an attention implementation; the one that a config names belongs to another machine.
    Raises UnsupportedModel or BrokenCheckpoint when transformers cannot build the model.
    """
    try:
        with without_compiler, torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype or serving_dtype(config), attn_implementation=attention
            )
    except AzuError:
        raise
    except Exception as error:  # constructors raise errors of many types for a wrong number
        reason = plain_reason(error, "its values do not fit each other")
        raise BrokenCheckpoint(f"config.json cannot be built as {config.model_type}: {reason}") from error
    return model.eval()


def serving_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the config's dtype, or float32 when it has none."""
    dtype = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    if dtype not in SERVED_DTYPES:
        raise UnsupportedModel(f"weights in {str(dtype).removeprefix('torch.')} cannot be served")
    assert isinstance(dtype, torch.dtype)
    return dtype


def find_layers(model: PreTrainedModel) -> LayerList:
    """Return the decoder's layer list: the largest list with one entry per layer."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    if not sizes:
        raise UnsupportedModel(f"{model.config.model_type} has no list of {num_layers} layers")
    decoder_path, _, attribute = max(sizes, key=lambda name: sizes[name]).rpartition(".")
    return LayerList(decoder_path, attribute)


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer's experts: the module at `path` in the layer, for which `is_experts_module` is true."""

    path: str
    module: nn.Module
    num_experts: int


def experts_in(layer: nn.Module) -> Experts | None:
    """Return a layer's experts, None for a dense layer; raises UnsupportedModel for two such modules."""
    found = [
        Experts(name, module, module.num_experts)
        for name, module in layer.named_modules()
        if is_experts_module(module)
    ]
    if len(found) > 1:
        raise UnsupportedModel("a layer has two sets of experts")
    return found[0] if found else None


def named_embeddings(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """Yield each embedding table with its path."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            yield name, module


def silence_padding_warnings(model: nn.Module) -> None:
    """Disable the check for padding among token ids: it costs time and needs values."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = lambda *_, **__: None


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
