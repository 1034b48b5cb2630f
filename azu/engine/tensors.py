"""Tensors to and from the raw bytes of a frame."""

import math
from typing import Any

import torch
from torch import Tensor

from azu.errors import FrameError
from azu.protocol.frame import Frame


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in frames and structures, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return torch's dtype with a name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def payload_of(tensor: Tensor) -> memoryview:
    """Return a tensor's raw bytes, without a copy when it is contiguous in host memory."""
    return _bytes_of(tensor.cpu().contiguous())


def tensor_of(frame: Frame, device: torch.device) -> Tensor:
    """Return a copy of a frame's tensor on a device; raises FrameError when a float is not finite."""
    # Received bytes are read-only and not aligned: a tensor needs this one copy.
    tensor = torch.empty(frame.shape, dtype=dtype_named(frame.dtype))
    if frame.payload:
        _bytes_of(tensor)[:] = frame.payload
    if not all_finite(tensor):
        raise FrameError(f"step {frame.step}: some values are not finite")
    return tensor.to(device)


def all_finite(tensor: Tensor) -> bool:
    """Say whether no value of a tensor is infinite or NaN; integers never are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Much faster than isfinite() of each value; both are NaN where one value is.
    return all(map(math.isfinite, map(float, tensor.aminmax())))


def _bytes_of(tensor: Tensor) -> memoryview:
    # By way of uint8: numpy has no bfloat16.
    values: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(values)
