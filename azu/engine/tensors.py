"""Tensors to and from the raw bytes of a frame."""

from typing import Any

import torch
from torch import Tensor

from azu.errors import FrameError
from azu.protocol.frame import Frame


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that frames and structures use, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return torch's dtype of that name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def payload_of(tensor: Tensor) -> memoryview:
    """Return a tensor's raw bytes, without a copy when it is contiguous in host memory."""
    return _bytes_of(tensor.cpu().contiguous())


def tensor_of(frame: Frame, device: torch.device) -> Tensor:
    """Return a frame's tensor in memory of its own; raises FrameError when a float is not finite."""
    # Received bytes are read-only and aligned to nothing: the one copy here makes them a tensor.
    tensor = torch.empty(frame.shape, dtype=dtype_named(frame.dtype))
    _bytes_of(tensor)[:] = frame.payload
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise FrameError(f"step {frame.step}: values that are not finite")
    return tensor.to(device)


def _bytes_of(tensor: Tensor) -> memoryview:
    # Through uint8: numpy has no bfloat16.
    values: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(values)
