"""Steps that do not fit into the free memory run again in smaller parts, one after the other."""

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
# The errors of torch's host allocator, of C++ and of oneDNN when memory is short; a GPU has a class of its
# own. oneDNN remembers a failure: a product of as many rows then always fails, and always runs in parts.
_MESSAGES = (
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
        """Return two parts to run in this order, None for a single token.

        A part that runs again writes the same keys and values to the same slots.
        """
        if len(self.slices) > 1:
            middle = len(self.slices) // 2
            first, second = self.slices[:middle], self.slices[middle:]
        else:
            (slice_,) = self.slices
            half = slice_.num_tokens // 2
            if not half:
                return None
            first = (replace(slice_, num_tokens=half, sample=False),)
            second = (replace(slice_, position=slice_.position + half, num_tokens=slice_.num_tokens - half),)
        num_rows = sum(slice_.num_tokens for slice_ in first)
        return StepPart(first, self.rows[:num_rows]), StepPart(second, self.rows[num_rows:])


def run_in_parts(
    run: Callable[[_Part], _Ran],
    whole: _Part,
    halves: Callable[[_Part], tuple[_Part, _Part] | None],
    device_type: str,
) -> list[_Ran]:
    """Run work whole, or in halves of halves while memory runs out; return the results in order.

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
    """Return the result, None when memory ran out; on return the error no longer keeps tensors alive."""
    try:
        return run(part)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        log.warning("out of memory, the step runs in smaller parts: %s", error)
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(message in str(error) for message in _MESSAGES)
