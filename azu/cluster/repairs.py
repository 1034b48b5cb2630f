"""Rules of repairs: whose turn it is, how long a repair waits after vain ones, which job is to blame."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from azu.contact import doubling_s
from azu.protocol.job import ChoiceKey

# A choice that was under way at so many losses, and came no further between them, caused them.
_MOST_LOSSES = 3
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 15.0


class RepairTurns:
    """Has the pipelines of one model repaired one after another.

    The first repair begins at once. One that follows `vain` ones waits, up to twice as long each time; half
    of the wait is random, so that models do not repair in step.
    """

    def __init__(
        self, chance: random.Random | None = None, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._chance = chance or random.Random()  # noqa: S311 - nothing secret
        self._sleep = sleep
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def turn(self, vain: int) -> AsyncIterator[None]:
        """Wait for the turn of a pipeline whose last `vain` repairs did not help, and keep it."""
        async with self._lock:
            await self.rest(vain)
            yield

    async def rest(self, vain: int) -> None:
        """Wait after `vain` attempts that did not help."""
        if vain > 0:
            await self._sleep(doubling_s(_FIRST_WAIT_S, _LONGEST_WAIT_S, vain, self._chance))


@dataclass(frozen=True, slots=True)
class Suspicion:
    """After a loss: the choices that are to run alone until they come further, and the jobs to blame."""

    alone: frozenset[ChoiceKey] = frozenset()
    guilty: frozenset[str] = frozenset()


class Suspects:
    """The choices of jobs in whose steps pieces were lost, and how often since each came further."""

    def __init__(self) -> None:
        self._losses: dict[ChoiceKey, tuple[int, int]] = {}  # its progress, losses since

    def lost(self, under_way: Mapping[ChoiceKey, int]) -> Suspicion:
        """Take a loss of pieces; `under_way` is the progress of each choice that had a step in flight.

        The progress is any number that changes when the choice comes further. After a second loss the
        suspects run one by one: so the third has only the guilty one under way.
        """
        for choice, progress in under_way.items():
            before, losses = self._losses.get(choice, (progress, 0))
            self._losses[choice] = (progress, losses + 1 if progress == before else 1)
        guilty = frozenset(choice[0] for choice in under_way if self._losses[choice][1] >= _MOST_LOSSES)
        alone = self.alone(under_way)
        return Suspicion(frozenset(choice for choice in alone if choice[0] not in guilty), guilty)

    def alone(self, under_way: Mapping[ChoiceKey, int]) -> frozenset[ChoiceKey]:
        """Return the choices that run one by one: none that is further on in `under_way`."""
        return frozenset(
            choice
            for choice, (progress, losses) in self._losses.items()
            if losses > 1 and under_way.get(choice, progress) == progress
        )

    def forget(self, job_id: str) -> None:
        """Forget a job that has ended."""
        for choice in [one for one in self._losses if one[0] == job_id]:
            del self._losses[choice]


class RepairTimes:
    """How many seconds after its start each step of a repair was done."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._steps: list[str] = []

    def passed(self, step: str) -> None:
        """Note that a step is done."""
        self._steps.append(f"{step} {time.monotonic() - self._started_s:.2f} s")

    def __str__(self) -> str:
        return ", ".join(self._steps)
