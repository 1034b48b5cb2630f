"""Token slices on their way to experts and back.

A request is three frames, each behind its length (unsigned 64 bit, little endian): hidden states
[tokens, hidden], expert ids [tokens, k], routing weights [tokens, k]. An id of -1 is a choice that somebody
else serves. The answer is one frame of weighted sums [tokens, hidden].
"""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from azu.engine.tensors import dtype_name, payload_of, tensor_of
from azu.errors import FrameError
from azu.protocol.frame import Frame

_LENGTH = struct.Struct("<Q")
_NUM_FRAMES = 3


@dataclass(frozen=True, slots=True)
class StepId:
    """Which step, and which stage's, a slice belongs to."""

    epoch: int
    step: int
    micro_batch: int
    stage: int

    def frame(self, tensor: Tensor) -> bytes:
        """Return a tensor as a frame of this step."""
        return Frame(
            epoch=self.epoch,
            step=self.step,
            micro_batch=self.micro_batch,
            stage=self.stage,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            rows=(),
            payload=payload_of(tensor),
        ).encode()


@dataclass(frozen=True, slots=True)
class TokenSlices:
    """What experts need of the tokens routed to them: hidden [T, H], ids [T, k] and weights [T, k]."""

    step: StepId
    hidden: Tensor
    ids: Tensor
    weights: Tensor

    def encode(self) -> bytes:
        """Return the request's bytes."""
        frames = [self.step.frame(tensor) for tensor in (self.hidden, self.ids.to(torch.int32), self.weights)]
        return b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames)

    @classmethod
    def decode(cls, request: bytes, device: torch.device) -> "TokenSlices":
        """Check a received request; raises FrameError when its parts are malformed or do not fit together."""
        frames = [Frame.decode(part) for part in _split(request)]
        hidden, ids, weights = (tensor_of(frame, device) for frame in frames)
        if hidden.dim() != 2 or ids.shape != weights.shape or ids.dim() != 2 or len(ids) != len(hidden):
            raise FrameError("an expert request's hidden states, ids and weights do not fit together")
        if ids.dtype is not torch.int32:
            raise FrameError(f"an expert request's ids are {ids.dtype}")
        first = frames[0]
        step = StepId(first.epoch, first.step, first.micro_batch, first.stage)
        return cls(step, hidden, ids.long(), weights)


def decode_answer(answer: bytes, sent: TokenSlices, device: torch.device) -> Tensor:
    """Check the experts' answer to a request; raises FrameError when it does not belong to it."""
    frame = Frame.decode(answer)
    step = sent.step
    if (frame.epoch, frame.step, frame.micro_batch) != (step.epoch, step.step, step.micro_batch):
        raise FrameError(f"experts answered step {frame.step} when asked for step {step.step}")
    if frame.shape != tuple(sent.hidden.shape) or frame.dtype != dtype_name(sent.hidden.dtype):
        raise FrameError(f"experts answered {frame.dtype} {list(frame.shape)} of another size than they got")
    return tensor_of(frame, device)


def _split(request: bytes) -> list[bytes]:
    parts, offset = [], 0
    while offset < len(request):
        if len(request) - offset < _LENGTH.size:
            raise FrameError("an expert request is truncated")
        (length,) = _LENGTH.unpack_from(request, offset)
        offset += _LENGTH.size
        parts.append(request[offset : offset + length])
        offset += length
    if len(parts) != _NUM_FRAMES or offset != len(request):
        raise FrameError(f"an expert request has {len(parts)} frames or is truncated")
    return parts
