"""One generic builder: any causal language model of transformers, cut to a span of its layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from azu.architecture.config import read_config
from azu.architecture.description import Architecture
from azu.architecture.inspection import describe
from azu.architecture.skeleton import build_from, replace_module, silence_padding_warnings
from azu.engine.attention import PACKED
from azu.engine.cutting import CutSkeleton
from azu.engine.experts import HeldExperts
from azu.engine.forward import StageModel
from azu.engine.linear import can_pack, pack
from azu.engine.longrope import place_by_sequence_length
from azu.engine.packing import takes_packed_batches
from azu.engine.tensors import dtype_named
from azu.engine.weights import load, stage_tensors
from azu.protocol.structure import LayerKind, Structure
from azu.protocol.topology import LayerSpan


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
    cut = CutSkeleton(model, architecture, span, tied_head=structure.tied_head)
    held = {
        layer: tuple(sorted(experts.get(layer, ())))
        for layer in range(span.start, span.end)
        if structure.layers[layer].kind is LayerKind.MOE
    }
    spread = {layer: ids for layer, ids in held.items() if len(ids) < structure.layers[layer].num_experts}
    found = {layer: cut.shrink_experts(layer, len(ids)) for layer, ids in spread.items()}
    cut.spare_from_initialisation()
    load(model, stage_tensors(structure, span, held, shard_paths), device)
    cut.drop_borrowed_embedding()
    if can_pack(device, model.dtype):
        pack(model)
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
