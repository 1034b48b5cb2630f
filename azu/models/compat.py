"""Where transformers puts each tensor of a checkpoint, asked of transformers itself.

Checkpoints name tensors in many ways (with or without a prefix, one tensor per expert or one for all);
the library's own loading rules map every one of them to a parameter of the model on the meta device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from azu.errors import BrokenCheckpoint
from azu.models.checkpoint import StoredTensor

_MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class TargetParameter:
    """The model's parameter that a tensor becomes (part of), and the dtype it is served in (torch's name)."""

    parameter: str
    dtype: str


def destinations(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> dict[str, TargetParameter]:
    """Return the destination of every tensor that the model uses, in the checkpoint's natural order.

    `model` lies on the meta device in the serving dtype. Left out are tensors that it has no place for:
    the layers of multi-token prediction, old buffers.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    kept = model._get_dtype_plan(model.dtype)
    kept_names = build_glob_alternation(list(kept))[0] if kept else None
    found: dict[str, TargetParameter] = {}
    for name in sorted(tensors, key=dot_natural_key):
        parameter, _ = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter = name
        if parameter in parameters:
            exact = kept_names is not None and kept_names.search(parameter)
            dtype = torch.float32 if exact else parameters[parameter].dtype
            found[name] = TargetParameter(parameter, str(dtype).removeprefix("torch."))
    return found


def refuse_incomplete(model: PreTrainedModel, tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Load the checkpoint's shapes into the model, which ends on the meta device as it began.

    Raises BrokenCheckpoint that names `where` and the parameters with no tensor or one of another shape.
    """
    hollow = {
        name: torch.empty(tensor.shape, dtype=model.dtype, device="meta") for name, tensor in tensors.items()
    }
    logging.disable_progress_bar()  # transformers draws one for every load
    rules = LoadStateDictConfig(
        dtype=model.dtype,
        weight_mapping=get_model_conversion_mapping(model),
        device_map={"": "meta"},
        dtype_plan=model._get_dtype_plan(model.dtype),
    )
    info, _ = convert_and_load_state_dict_in_model(model, hollow, rules)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    for parameter, found, expected in sorted(info.mismatched_keys):
        raise BrokenCheckpoint(
            f"{where}: {parameter!r} is {tuple(found)} where config.json says {tuple(expected)}"
        )
    broken = sorted({*info.missing_keys, *info.conversion_errors}, key=dot_natural_key)
    if broken:
        named = ", ".join(broken[:_MAX_NAMED]) + (", ..." if len(broken) > _MAX_NAMED else "")
        raise BrokenCheckpoint(f"{where} lacks tensors for {named}")


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
