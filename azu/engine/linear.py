"""How a weight is held for speed on its device: on a CPU packed once for oneDNN, as torch compile does it.

torch's plain product of few rows with a float32 matrix reaches a third of what packed weights do. A packed
weight is a copy, so whatever was mapped for it is let go.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# What oneDNN is told to expect; packed weights serve any number of rows.
_EXPECTED_ROWS = 16
# With fewer float32 rows it reads weights a seventh slower: they are repeated.
_LEAST_ROWS = 4
# Below this the call costs more than the product.
_MIN_WEIGHT_VALUES = 64 * 1024
_STACK_DIMS = 3  # [experts, out, in]


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's own order."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack a weight [out, in]; it may be let go afterwards."""
        super().__init__()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
        self._bias = None if bias is None else bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in] times the weight, plus the bias: [..., out]."""
        rows = x.shape[:-1].numel()
        if x.dtype is not torch.float32 or not 0 < rows < _LEAST_ROWS:
            return self._product(x)
        repeated = x.reshape(rows, -1).repeat(_LEAST_ROWS // rows, 1)
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
    """Replace a model's linear layers by packed ones, and copy what else is mapped of their files.

    One tensor that is left of a mapped file keeps in memory all that was read of it. Embeddings stay mapped,
    for few of their rows are read, and so does a model without a layer that is worth packing.
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
    # One by one down the tree: a layer's file is let go before the next one's is read.
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
