"""From shard files to the parameters of a cut model: mapped, not copied, where the dtypes agree."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from azu.errors import ShardError
from azu.protocol.structure import Shard, Structure
from azu.protocol.topology import LayerSpan

_EXPERT = re.compile(r"((?:^|\.)experts\.)(\d+)(?=\.)")


def stage_tensors(
    structure: Structure,
    span: LayerSpan,
    experts: Mapping[int, tuple[int, ...]],
    shard_paths: Mapping[str, Path],
) -> dict[str, Tensor]:
    """Return what a stage holds, under the checkpoint's names with layers counted from the span's start.

    Of each MoE layer only `experts[layer]` are taken, counted in that order.
    Raises ShardError when a shard is missing, unreadable or not named as the structure says.
    """
    tensors: dict[str, Tensor] = {}
    for shard in structure.edge_shards(span.start, span.end):
        tensors.update(_read(shard, shard_paths))
    for layer in range(span.start, span.end):
        tensors.update(_moved(_read(structure.layer_shard(layer), shard_paths), layer, layer - span.start))
        if held := experts.get(layer, ()):
            tensors.update(expert_tensors(structure, layer, held, shard_paths, as_layer=layer - span.start))
    return tensors


def expert_tensors(
    structure: Structure,
    layer: int,
    experts: tuple[int, ...],
    shard_paths: Mapping[str, Path],
    *,
    as_layer: int,
) -> dict[str, Tensor]:
    """Return some experts of a layer, renumbered in the order given; fused tensors are joined again."""
    tensors: dict[str, Tensor] = {}
    slices: dict[str, list[Tensor]] = defaultdict(list)
    for place, expert in enumerate(experts):
        content = _read(structure.expert_shard(layer, expert), shard_paths)
        for name, tensor in _moved(content, layer, as_layer).items():
            if _EXPERT.search(name):
                tensors[_EXPERT.sub(rf"\g<1>{place}", name, count=1)] = tensor
            else:
                slices[name].append(tensor)
    return tensors | {
        name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in slices.items()
    }


def load(model: PreTrainedModel, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Load a whole stage through transformers' own renaming and fusing rules; buffers are made anew.

    Raises ShardError for a parameter that the tensors do not fill or fill with another shape.
    """
    info = _convert(model, tensors, device)
    model.mark_tied_weights_as_initialized(info)
    model._move_missing_keys_from_meta_to_device(info.missing_and_mismatched(), {"": str(device)}, None, None)
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    missing = info.missing_keys - set(model.all_tied_weights_keys)
    wrong = sorted({*missing, *info.conversion_errors, *(found[0] for found in info.mismatched_keys)})
    if wrong:
        raise ShardError(f"the shards do not fill {wrong[0]!r} ({len(wrong)} such parameters)")
    _refuse_meta(model)


def load_part(
    model: PreTrainedModel, part: nn.Module, tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Load one module of a model that stays on the meta device otherwise; see `load`."""
    info = _convert(model, tensors, device)
    wrong = sorted(
        {*info.unexpected_keys, *info.conversion_errors, *(found[0] for found in info.mismatched_keys)}
    )
    if wrong:
        raise ShardError(f"{wrong[0]!r} does not fit into the model")
    _refuse_meta(part)


def _convert(model: PreTrainedModel, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    transformers_logging.disable_progress_bar()
    rules = LoadStateDictConfig(
        dtype=model.dtype,
        weight_mapping=get_model_conversion_mapping(model),
        device_map={"": str(device)},
        dtype_plan=model._get_dtype_plan(model.dtype),
    )
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), rules)
    return info


def _refuse_meta(module: nn.Module) -> None:
    """Raise ShardError when something of a module has no memory yet."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise ShardError(f"no shard holds {name!r}")


def _read(shard: Shard, shard_paths: Mapping[str, Path]) -> dict[str, Tensor]:
    path = shard_paths.get(shard.name)
    if path is None:
        raise ShardError(f"shard {shard.name!r} was not fetched")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ShardError(f"shard {shard.name!r} cannot be read: {error}") from error
    if found.keys() != shard.tensors.keys():
        raise ShardError(f"shard {shard.name!r} does not hold the tensors that the structure names")
    return found


def _moved(tensors: Mapping[str, Tensor], layer: int, as_layer: int) -> dict[str, Tensor]:
    return {_renumber(name, layer, as_layer): tensor for name, tensor in tensors.items()}


def _renumber(name: str, layer: int, as_layer: int) -> str:
    """Change the layer number in a tensor's name: the first number of its path."""
    path = name.split(".")
    place = next((index for index, part in enumerate(path) if part.isdigit()), None)
    if place is None or int(path[place]) != layer:
        raise ShardError(f"{name!r} is no tensor of layer {layer}")
    path[place] = str(as_layer)
    return ".".join(path)
