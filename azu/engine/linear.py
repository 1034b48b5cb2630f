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
def pack(module: nn.Module) -> None:
    """Replace the linear layers inside a module by packed ones; copy what else is mapped beside them."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if (packed := _packed(child)) is not None:
                setattr(parent, name, packed)
    for parameter in module.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            # A view of a mapped file would keep in memory all that was read from it.
            parameter.data = parameter.data.clone()


def _packed(module: nn.Module) -> PackedLinear | None:
    if type(module) not in (nn.Linear, Conv1D):
        return None
    weight, bias = module.get_parameter("weight"), module.bias
    assert bias is None or isinstance(bias, Tensor)
    if weight.numel() < _MIN_WEIGHT_VALUES:
        return None
    return PackedLinear(weight if type(module) is nn.Linear else weight.t(), bias)
