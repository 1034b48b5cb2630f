"""Waiting for what loops do in their own time, and ending them as a process that dies does."""

import asyncio
import random
from collections.abc import Callable

from azu.cluster.repairs import RepairTurns
from azu.metrics import Meter
from azu.supervision import Supervisor


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until a condition holds; fails after a time that only a hang takes."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


def end_other_tasks() -> None:
    """End every other task, as if the process that ran them had died."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


def turns_at_once(waited_s: list[float] | None = None) -> RepairTurns:
    """Return turns in which no repair waits; each wait is noted instead."""
    noted = [] if waited_s is None else waited_s

    async def note(seconds: float) -> None:
        noted.append(seconds)

    return RepairTurns(random.Random(1), note)


def supervisor_at_once() -> Supervisor:
    """Return a supervisor whose pauses take no time, and which replaces no process."""

    async def pause(_: float) -> None:
        await asyncio.sleep(0)

    return Supervisor("test", Meter(), lambda: None, sleep=pause)


def failing_once(owner: object, name: str, error: Exception) -> None:
    """Have the next call of a method raise."""
    original = getattr(owner, name)

    async def fail(*_: object, **__: object) -> None:
        setattr(owner, name, original)
        raise error

    setattr(owner, name, fail)
