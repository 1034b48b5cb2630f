"""Token slices on their way to experts and back.

A request is three frames, each behind its length (unsigned 64 bit, little endian): hidden states
[tokens, hidden], expert ids [tokens, k], routing weights [tokens, k]. An id of -1 is a choice that somebody
else serves. The answer is one frame of weighted sums [tokens, hidden] whose only row names the request by its
checksum and the layer: no other answer, of another layer or holder or of before, is taken for it.
"""

import struct
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from azu.engine.tensors import dtype_name, payload_of, tensor_of
from azu.errors import FrameError
from azu.protocol.frame import Frame, FrameRow

_LENGTH = struct.Struct("<Q")
_NUM_FRAMES = 3


@dataclass(frozen=True, slots=True)
class StepId:
    """Which step, and which stage's, a slice belongs to."""

    epoch: int
    step: int
    micro_batch: int
    stage: int

    def frame(self, tensor: Tensor, rows: tuple[FrameRow, ...] = ()) -> bytes:
        """Return a tensor as a frame of this step."""
        return Frame(
            epoch=self.epoch,
            step=self.step,
            micro_batch=self.micro_batch,
            stage=self.stage,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            rows=rows,
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
        steps = {StepId(one.epoch, one.step, one.micro_batch, one.stage) for one in frames}
        if len(steps) != 1:
            raise FrameError("an expert request's parts are of different steps")
        return cls(steps.pop(), hidden, ids.long(), weights)


def encode_answer(sums: Tensor, request: bytes, step: StepId, layer: int) -> bytes:
    """Return the experts' answer to a request of a layer."""
    return step.frame(sums, _rows(request, layer, len(sums)))


def decode_answer(
    answer: bytes, request: bytes, sent: TokenSlices, layer: int, device: torch.device
) -> Tensor:
    """Check the experts' answer to a request; raises FrameError when it does not belong to it."""
    frame = Frame.decode(answer)
    step = sent.step
    if (frame.epoch, frame.step, frame.micro_batch) != (step.epoch, step.step, step.micro_batch):
        raise FrameError(f"experts answered step {frame.step} when asked for step {step.step}")
    if frame.shape != tuple(sent.hidden.shape) or frame.dtype != dtype_name(sent.hidden.dtype):
        raise FrameError(f"experts answered {frame.dtype} {list(frame.shape)} of another size than they got")
    if frame.rows != _rows(request, layer, len(sent.hidden)):
        raise FrameError(f"experts answered another request of step {frame.step}")
    return tensor_of(frame, device)


def _rows(request: bytes, layer: int, num_tokens: int) -> tuple[FrameRow, ...]:
    return (FrameRow(xxhash.xxh3_64_intdigest(request), layer, num_tokens),)


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
