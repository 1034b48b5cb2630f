"""From shard files to the parameters of a cut model.

Tensors are mapped and not copied where the dtypes agree. On a CPU with oneDNN, linear layers are then packed
into the order that oneDNN multiplies fastest.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from azu.errors import ShardError
from azu.models.compat import convert_and_load, load_whole
from azu.protocol.structure import Shard, Structure
from azu.protocol.topology import LayerSpan

_EXPERT = re.compile(r"((?:^|\.)experts\.)(\d+)(?=\.)")
# The number of rows that oneDNN packs for; packed weights serve any number.
_EXPECTED_ROWS = 16
# With fewer float32 rows oneDNN reads weights a seventh slower: the rows are repeated.
_MIN_ROWS = 4
# For a smaller weight the call costs more than the product.
_MIN_WEIGHT_VALUES = 64 * 1024
_STACK_DIMS = 3  # [experts, out, in]


def stage_tensors(
    structure: Structure,
    span: LayerSpan,
    experts: Mapping[int, tuple[int, ...]],
    shard_paths: Mapping[str, Path],
) -> dict[str, Tensor]:
    """Return a stage's tensors under the checkpoint's names, with layers counted from the span's start.

    Of each MoE layer only the experts `experts[layer]` are read, and numbered in that order.
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
    """Load a whole stage by transformers' own rules for renaming and fusing; buffers are made anew.

    Raises ShardError for a parameter that the tensors do not fill or fill with another shape.
    """
    wrong = load_whole(model, tensors, device)
    if wrong:
        raise ShardError(f"the shards do not fill {wrong[0]!r} ({len(wrong)} such parameters)")
    _refuse_meta(model)


def load_part(
    model: PreTrainedModel, part: nn.Module, tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Load one module of a model whose other modules stay on the meta device; see `load`."""
    info = convert_and_load(model, tensors, device)
    wrong = sorted(
        {*info.unexpected_keys, *info.conversion_errors, *(found[0] for found in info.mismatched_keys)}
    )
    if wrong:
        raise ShardError(f"{wrong[0]!r} does not fit into the model")
    _refuse_meta(part)


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


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's own order."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack a weight [out, in], which is not needed afterwards."""
        super().__init__()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
        self._bias = None if bias is None else bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in] times the weight, plus the bias: [..., out]."""
        rows = x.shape[:-1].numel()
        if x.dtype is not torch.float32 or not 0 < rows < _MIN_ROWS:
            return self._product(x)
        repeated = x.reshape(rows, -1).repeat(_MIN_ROWS // rows, 1)
        return self._product(repeated)[:rows].reshape(*x.shape[:-1], -1)

    def _product(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether weights of a dtype are worth packing on a device."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


@torch.inference_mode()
def pack(model: nn.Module) -> None:
    """Replace a model's linear layers by packed ones, and copy all other tensors of their mapped files.

    One mapped tensor keeps in memory all that was read of its file. Embeddings stay mapped, because few of
    their rows are read; so does a model without a layer that is worth packing.
    """
    if any(_is_worth_packing(module) for module in model.modules()):
        _pack(model)


def _pack(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        return
    for parameter in module.parameters(recurse=False):
        # Stacks of experts were copied when they were joined.
        if parameter.dim() < _STACK_DIMS:
            parameter.data = parameter.data.clone()
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.clone())
    # Child by child: the file of one layer is released before the next one's is read.
    for name, child in list(module.named_children()):
        if _is_worth_packing(child):
            setattr(module, name, _packed(child))
        else:
            _pack(child)


def _packed(linear: nn.Module) -> PackedLinear:
    weight, bias = linear.get_parameter("weight"), linear.bias
    assert bias is None or isinstance(bias, Tensor)
    return PackedLinear(weight if type(linear) is nn.Linear else weight.t(), bias)


def _is_worth_packing(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, Conv1D):
        return False
    return module.get_parameter("weight").numel() >= _MIN_WEIGHT_VALUES
