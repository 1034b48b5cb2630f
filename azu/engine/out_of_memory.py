"""What does not fit into the memory that is left runs again in smaller parts, one after the other."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from azu.engine.malloc import give_back
from azu.engine.stage_contract import OutOfMemory
from azu.protocol.step import Slice

log = logging.getLogger(__name__)

_Part = TypeVar("_Part")
_Ran = TypeVar("_Ran")
# How torch's allocator on the host, C++ itself and oneDNN say it; on a GPU there is a class of its own.
# oneDNN remembers a failure: a product of as many rows fails for good, and always runs in parts from then on.
_SAYINGS = (
    "DefaultCPUAllocator",
    "bad_alloc",
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
)


@dataclass(frozen=True, slots=True)
class StepPart:
    """Some slices of a step with their rows: token ids [tokens] or hidden states [tokens, hidden]."""

    slices: tuple[Slice, ...]
    rows: Tensor

    def halves(self) -> "tuple[StepPart, StepPart] | None":
        """Return two parts to be run in this order, None for a single token.

        Running a part again writes the same keys and values to the same slots.
        """
        if len(self.slices) > 1:
            middle = len(self.slices) // 2
            first, second = self.slices[:middle], self.slices[middle:]
        else:
            (piece,) = self.slices
            half = piece.num_tokens // 2
            if not half:
                return None
            first = (replace(piece, num_tokens=half, sample=False),)
            second = (replace(piece, position=piece.position + half, num_tokens=piece.num_tokens - half),)
        num_rows = sum(piece.num_tokens for piece in first)
        return StepPart(first, self.rows[:num_rows]), StepPart(second, self.rows[num_rows:])


def run_in_parts(
    run: Callable[[_Part], _Ran],
    whole: _Part,
    halves: Callable[[_Part], tuple[_Part, _Part] | None],
    device_type: str,
) -> list[_Ran]:
    """Run something whole, or as halves of halves as far as memory runs out; return what came, in order.

    Raises OutOfMemory when the smallest part does not fit.
    """
    done: list[_Ran] = []
    waiting = [whole]
    while waiting:
        part = waiting.pop()
        ran = _tried(run, part)
        if ran is not None:
            done.append(ran)
            continue
        give_back(device_type)
        smaller = halves(part)
        if smaller is None:
            raise OutOfMemory("there is no memory left for a step of one token")
        waiting += reversed(smaller)
    return done


def _tried(run: Callable[[_Part], _Ran], part: _Part) -> _Ran | None:
    """Return what came, None when memory ran out: with the error goes all that the attempt held."""
    try:
        return run(part)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        log.warning("out of memory, it runs in smaller parts: %s", error)
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(saying in str(error) for saying in _SAYINGS)
