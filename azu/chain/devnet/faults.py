"""What can go wrong between azu and a chain, switched on by hand."""

import random
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class FaultKind(StrEnum):
    """The faults: down to DELAY they hit one answer, below it they change what the chain does."""

    REPLY_DROPPED_BEFORE = "reply_dropped_before"  # the action is not carried out
    REPLY_DROPPED_AFTER = "reply_dropped_after"  # it is, but nobody says so
    UNPROCESSABLE = "unprocessable"  # 422 in plain text
    RATE_LIMITED = "rate_limited"  # 429 with the body `null`
    SERVER_ERROR_BEFORE = "server_error_before"  # 500, the action is not carried out
    SERVER_ERROR_AFTER = "server_error_after"  # 500, but it is
    DELAY = "delay"  # the answer takes `seconds` longer
    RESTART = "restart"  # every connection is cut for `seconds`
    ROWS_LATE = "rows_late"  # ledger rows appear `seconds` later, with their own time
    ROWS_TWICE = "rows_twice"
    SECOND_HYPE = "second_hype"  # another token called HYPE exists from now on


class Fault(BaseModel):
    """One fault: strikes with probability `chance` until it has struck `times` times (None: for ever).

    `path` is which requests it strikes, where it is one that hits an answer.
    """

    model_config = ConfigDict(extra="forbid")

    kind: FaultKind
    path: Literal["/exchange", "/info", "/explorer"] = "/exchange"
    times: int | None = Field(default=1, ge=1)
    chance: float = Field(default=1.0, gt=0, le=1)
    seconds: float = Field(default=0.0, ge=0, le=60)


class Faults:
    """The faults that are switched on."""

    def __init__(self, seed: int | None = None) -> None:
        self._active: list[Fault] = []
        self._random = random.Random(seed)  # noqa: S311

    def add(self, fault: Fault) -> None:
        """Switch a fault on."""
        self._active.append(fault)

    def clear(self) -> None:
        """Switch every fault off."""
        self._active.clear()

    def strike(self, *kinds: FaultKind, path: str | None = None) -> Fault | None:
        """Return the fault of one of these kinds that strikes now, if any; `path` narrows the choice."""
        for fault in self._active:
            fits = fault.kind in kinds and path in (None, fault.path)
            if fits and self._random.random() < fault.chance:
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times == 0:
                        self._active.remove(fault)
                return fault
        return None
