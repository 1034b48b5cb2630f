"""One generic builder: any causal language model of transformers, cut to a span of its layers."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from azu.architecture.config import read_config
from azu.architecture.description import Architecture
from azu.architecture.inspection import describe
from azu.architecture.skeleton import (
    Experts,
    build_from,
    experts_in,
    replace_module,
    silence_padding_warnings,
)
from azu.engine.attention import PACKED
from azu.engine.experts import HeldExperts, shrink
from azu.engine.forward import StageModel
from azu.engine.longrope import place_by_sequence_length
from azu.engine.packing import takes_packed_batches
from azu.engine.tensors import dtype_named
from azu.engine.weights import load, stage_tensors
from azu.protocol.structure import LayerKind, Structure
from azu.protocol.topology import LayerSpan

# How families call a layer's number, with which it finds its place in the KV cache.
_INDEX_NAMES = ("layer_idx", "layer_id")


@dataclass(frozen=True, slots=True)
class BuiltStage:
    """A stage with its weights. `spread` maps each layer whose experts are not all here to those that are."""

    model: StageModel
    spread: Mapping[int, HeldExperts | None]
    expert_paths: Mapping[int, str]
    eos_token_ids: tuple[int, ...]


def build_stage(
    structure: Structure,
    span: LayerSpan,
    experts: Mapping[int, tuple[int, ...]],
    shard_paths: Mapping[str, Path],
    config_folder: Path,
    device: torch.device,
) -> BuiltStage:
    """Build layers [start, end) of a model from its shards; `experts[layer]` are those beside its router.

    Raises UnsupportedModel when the family cannot be cut, ShardError when the shards are not the model's.
    """
    architecture = describe(config_folder)
    model, packed = _skeleton(read_config(config_folder), architecture, dtype_named(structure.dtype))
    cut = _Cut(model, architecture, span, tied_head=structure.tied_head)
    held = {
        layer: tuple(sorted(experts.get(layer, ())))
        for layer in range(span.start, span.end)
        if structure.layers[layer].kind is LayerKind.MOE
    }
    spread = {layer: ids for layer, ids in held.items() if len(ids) < structure.layers[layer].num_experts}
    found = {layer: cut.shrink_experts(layer, len(ids)) for layer, ids in spread.items()}
    _spare_from_initialisation(model)
    load(model, stage_tensors(structure, span, held, shard_paths), device)
    cut.drop_borrowed_embedding()
    if architecture.restart_length is not None:
        place_by_sequence_length(model)
    return BuiltStage(
        model=StageModel(
            model,
            cut.decoder,
            cut.layers,
            embedding_width=None if span.start == 0 else cut.embedding_width,
            packed=packed,
        ),
        spread={
            layer: HeldExperts(found[layer].module, ids, structure.layers[layer].num_experts) if ids else None
            for layer, ids in spread.items()
        },
        expert_paths={layer: experts.path for layer, experts in found.items()},
        eos_token_ids=architecture.eos_token_ids,
    )


def _skeleton(
    config: PreTrainedConfig, architecture: Architecture, dtype: torch.dtype
) -> tuple[PreTrainedModel, bool]:
    """Return the whole model on the meta device with the best attention it takes, and if that is packed."""
    packed = takes_packed_batches(config, architecture)
    model = build_from(config, dtype=dtype, attention=PACKED if packed else "eager")
    if not packed and model._supports_sdpa:
        # Built anew: some families choose the class of their attention when they are built.
        model = build_from(config, dtype=dtype, attention="sdpa")
    silence_padding_warnings(model)
    for path in architecture.unused:
        replace_module(model, path, nn.Identity())
    return model, packed


class _Cut:
    """A model on the meta device, reduced to what one stage runs."""

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, span: LayerSpan, *, tied_head: bool
    ) -> None:
        decoder_path, _, attribute = architecture.layers_path.rpartition(".")
        self.decoder = model.get_submodule(decoder_path)
        self._span = span
        self._first, self._last = span.start == 0, span.end == len(architecture.layers)
        self._front = _with_parameters(self.decoder, architecture.front - architecture.back)
        self.embedding_width = model.get_input_embeddings().embedding_dim
        # A tied head takes its weight from the embedding, which such a stage holds until it is loaded.
        self._borrows = tied_head and self._last and not self._first
        self.layers = self._keep_layers(attribute)
        self.decoder.config = _local_config(self.decoder.config, span, len(architecture.layers))
        self._drop_edges(model, architecture)

    def shrink_experts(self, layer: int, num_experts: int) -> Experts:
        """Leave room for that many experts of a layer."""
        block = self.layers[layer - self._span.start]
        found = experts_in(block)
        assert found is not None, f"layer {layer} has no experts"
        if num_experts:
            shrink(found.module, num_experts)
        else:
            replace_module(block, found.path, nn.Identity())
        return found

    def drop_borrowed_embedding(self) -> None:
        """Put stand-ins where the embedding was, once its weight is the head's."""
        if self._borrows:
            self._drop_front()

    def _keep_layers(self, attribute: str) -> nn.ModuleList:
        kept = nn.ModuleList(
            list(self.decoder.get_submodule(attribute).children())[self._span.start : self._span.end]
        )
        for module in kept.modules():
            for name in _INDEX_NAMES:
                if isinstance(index := getattr(module, name, None), int):
                    setattr(module, name, index - self._span.start)
        setattr(self.decoder, attribute, kept)
        return kept

    def _drop_edges(self, model: PreTrainedModel, architecture: Architecture) -> None:
        if not self._first and not self._borrows:
            self._drop_front()
        if not self._last:
            for name in _with_parameters(self.decoder, architecture.back - architecture.front):
                setattr(self.decoder, name, nn.Identity())
            head = model.get_output_embeddings()
            replace_module(model, next(n for n, m in model.named_modules() if m is head), nn.Identity())
        if not (self._first and self._last) and not self._borrows:
            model.all_tied_weights_keys = {}

    def _drop_front(self) -> None:
        for name in self._front:
            setattr(
                self.decoder,
                name,
                _Absent(is_embedding=isinstance(getattr(self.decoder, name), nn.Embedding)),
            )


class _Absent(nn.Module):
    """Stands for a module of the first stage: an embedding gives zero, anything else its argument."""

    def __init__(self, *, is_embedding: bool) -> None:
        super().__init__()
        self.weight = None
        self._is_embedding = is_embedding

    def forward(self, first: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros((), device=first.device) if self._is_embedding else first


def _spare_from_initialisation(model: nn.Module) -> None:
    """Mark modules that lost a child, so that transformers does not initialise what is gone."""
    for module in model.modules():
        lost_one = any(isinstance(child, nn.Identity | _Absent) for child in module.children())
        if lost_one and not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module._is_hf_initialized = True  # type: ignore[assignment] # a flag of transformers


def _with_parameters(decoder: nn.Module, names: frozenset[str]) -> tuple[str, ...]:
    return tuple(
        name for name in sorted(names) if any(True for _ in decoder.get_submodule(name).parameters())
    )


def _local_config(config: PreTrainedConfig, span: LayerSpan, num_layers: int) -> PreTrainedConfig:
    """Return the decoder's config as if it had only the span's layers."""
    local = copy.deepcopy(config)
    for name, value in list(vars(local).items()):
        if isinstance(value, list | tuple) and len(value) == num_layers and name != "architectures":
            setattr(local, name, list(value)[span.start : span.end])
    local.num_hidden_layers = len(span)
    return local
