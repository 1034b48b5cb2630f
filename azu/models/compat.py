"""Everything that azu uses of transformers beyond its public interface, each with the reason.

A new version of transformers may change any of it: `pyproject.toml` pins the version for that reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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

from azu.errors import BrokenCheckpoint
from azu.models.checkpoint import StoredTensor

_MAX_NAMED_PARAMETERS = 4


def is_recurrent(model: PreTrainedModel) -> bool:
    """Return whether a model keeps a state other than a KV cache; only the model's class knows that."""
    return bool(model._is_stateful)


def is_experts_module(module: nn.Module) -> bool:
    """Return whether a module maps (hidden [T, H], expert ids [T, k], weights [T, k]) to [T, H].

    transformers' `use_experts_implementation` gives this attribute to each such module and to no other; the
    modules have no class in common.
    """
    return hasattr(module, "_is_expert_parallel") and isinstance(module.num_experts, int)


@dataclass(frozen=True, slots=True)
class TargetParameter:
    """The model's parameter that a tensor becomes (part of), and the dtype it is served in (torch's name)."""

    parameter: str
    dtype: str


def target_parameters(
    model: PreTrainedModel, tensors: Mapping[str, StoredTensor]
) -> dict[str, TargetParameter]:
    """Return the parameter that each tensor belongs to, in the checkpoint's natural order.

    `model` lies on the meta device in the serving dtype. Tensors that the model has no place for are left
    out: the layers of multi-token prediction, old buffers.
    Checkpoints name tensors in many ways (with or without a prefix, one tensor per expert or one for all).
    The rules that map these names to parameters are only in transformers' loader.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    # These globs name the parameters that a family keeps in float32 whatever the serving dtype is.
    float32_globs = model._get_dtype_plan(model.dtype)
    in_float32 = build_glob_alternation(list(float32_globs))[0] if float32_globs else None
    found: dict[str, TargetParameter] = {}
    for name in sorted(tensors, key=dot_natural_key):
        parameter, _ = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter = name
        if parameter in parameters:
            is_exact = in_float32 is not None and in_float32.search(parameter)
            dtype = torch.float32 if is_exact else parameters[parameter].dtype
            found[name] = TargetParameter(parameter, str(dtype).removeprefix("torch."))
    return found


def convert_and_load(model: PreTrainedModel, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Load tensors under a checkpoint's names into a model and return transformers' loading info.

    Only transformers' internal loader takes a part of the tensors: `from_pretrained` reads whole checkpoints
    from files. The caller handles missing keys and tied weights.
    """
    logging.disable_progress_bar()  # transformers draws one for every load
    rules = LoadStateDictConfig(
        dtype=model.dtype,
        weight_mapping=get_model_conversion_mapping(model),
        device_map={"": str(device)},
        dtype_plan=model._get_dtype_plan(model.dtype),
    )
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), rules)
    return info


def refuse_incomplete(model: PreTrainedModel, tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Load the checkpoint's shapes into a model, which stays on the meta device.

    Raises BrokenCheckpoint that names `where` and the parameters with no tensor or one of another shape.
    Only a private method of transformers removes the keys that a family expects to miss.
    """
    hollow = {
        name: torch.empty(tensor.shape, dtype=model.dtype, device="meta") for name, tensor in tensors.items()
    }
    info = convert_and_load(model, hollow, torch.device("meta"))
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    for parameter, found, expected in sorted(info.mismatched_keys):
        raise BrokenCheckpoint(
            f"{where}: {parameter!r} is {tuple(found)} where config.json says {tuple(expected)}"
        )
    broken = sorted({*info.missing_keys, *info.conversion_errors}, key=dot_natural_key)
    if broken:
        more = ", ..." if len(broken) > _MAX_NAMED_PARAMETERS else ""
        raise BrokenCheckpoint(f"{where} lacks tensors for {', '.join(broken[:_MAX_NAMED_PARAMETERS])}{more}")


def load_whole(model: PreTrainedModel, tensors: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Load all parameters of a model, make its buffers anew and tie its weights.

    Return the parameters, by name, that the tensors do not fill or fill with another shape.
    The steps and their order are those of `from_pretrained`, which reads whole checkpoints from files.
    """
    info = convert_and_load(model, tensors, device)
    model.mark_tied_weights_as_initialized(info)
    model._move_missing_keys_from_meta_to_device(info.missing_and_mismatched(), {"": str(device)}, None, None)
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    missing = info.missing_keys - set(model.all_tied_weights_keys)
    return sorted({*missing, *info.conversion_errors, *(found[0] for found in info.mismatched_keys)})


def mark_initialized(module: nn.Module) -> None:
    """Keep `load_whole` from initialising a module: transformers would ask it for children that it lost."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def set_num_experts(module: nn.Module, num_experts: int) -> None:
    """Give an experts module another number of experts, and make it skip the id behind the last one.

    That id stands for an expert that is elsewhere, as in transformers' own expert parallelism.
    """
    module.num_experts = num_experts  # type: ignore[assignment]
    module._is_expert_parallel = True  # type: ignore[assignment]


def takes_registered_attention(model: PreTrainedModel) -> bool:
    """Return whether a model asks transformers' AttentionInterface; only the model's class knows that."""
    return bool(model._supports_attention_backend)


def takes_sdpa(model: PreTrainedModel) -> bool:
    """Return whether a model runs with torch's scaled dot product attention; only its class knows that."""
    return bool(model._supports_sdpa)
