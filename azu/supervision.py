"""Supervision: the background loops of a process outlive every exception, and no exception stays unnamed.

A loop is a step that is taken again and again. A step that raises is taken again after a pause. After five
faults in a row the process is replaced: what started it starts another, whose state is in Redis and in the
processes that live on. An answer that another service is away is no fault: the step waits without a limit.
"""

import asyncio
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from azu.contact import doubling_s
from azu.errors import AzuError, DeadlineExceeded, InternalError, Unavailable
from azu.metrics import FAULTS, UNHEALTHY, Meter

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

FAULTS_IN_A_ROW = 5
# A step that ran for so long before it raised ended the row, as one that returns does.
STEADY_S = 60.0
# The metrics, which are sent each second, show the fault before its process ends.
SHOWN_S = 3.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 2.0
# Another process or service cannot answer now: no fault of the step that asked it.
AWAY = (Unavailable, DeadlineExceeded)


class Supervisor:
    """Takes the steps of one process's loops; `replace` ends the process once one of them cannot go on.

    `component` names the process in logs and metrics, `meter` is the process's own. Pauses double and vary by
    chance, up to two seconds.
    """

    def __init__(
        self,
        component: str,
        meter: Meter,
        replace: Callable[[], None],
        *,
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.component = component
        self.meter = meter
        self._replace = replace
        self._chance = chance or random.Random()  # noqa: S311 - nothing secret
        self._clock = clock
        self._sleep = sleep
        self._tasks: set[asyncio.Task[None]] = set()
        self._failing: set[str] = set()
        self._show()

    @property
    def is_healthy(self) -> bool:
        """Whether no loop has failed five times in a row."""
        return not self._failing

    def start(self, loop: str, step: Callable[[], Awaitable[object]], *, every_s: float = 0.0) -> None:
        """Begin to `keep` a loop in a task of its own."""
        task = asyncio.create_task(self.keep(loop, step, every_s=every_s), name=loop)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Cancel the loops that were started, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start_thread(self, loop: str, step: Callable[[], bool]) -> None:
        """Take a step again and again in a thread of its own, whatever it raises, until it returns False."""

        async def once() -> bool:
            return step()

        async def run() -> None:
            self.meter.count(FAULTS, 0, self.component, loop)
            while await self.insist(loop, once):
                pass

        threading.Thread(target=lambda: asyncio.run(run()), name=loop, daemon=True).start()

    async def keep(self, loop: str, step: Callable[[], Awaitable[object]], *, every_s: float = 0.0) -> None:
        """Take a step every `every_s` until cancelled, whatever it raises."""
        self.meter.count(FAULTS, 0, self.component, loop)
        task = asyncio.current_task()
        assert task is not None
        # A library that gets a cancellation together with an answer may swallow the cancellation.
        while not task.cancelling():
            await self.insist(loop, step, every_s=every_s)
            await self._sleep(every_s)

    async def insist(
        self, loop: str, step: Callable[[], Awaitable[_Answer]], *, every_s: float = 0.0
    ) -> _Answer:
        """Take a step until it succeeds and return its answer; pauses are no shorter than `every_s`."""
        row = _Row()
        while True:
            began_s = self._clock()
            try:
                answer = await step()
            except Exception as error:
                pause_s = max(every_s, self._failed(loop, row, error, self._clock() - began_s))
                if row.faults == FAULTS_IN_A_ROW:
                    await self._sleep(SHOWN_S)
                    self._replace()
                await self._sleep(pause_s)
            else:
                if loop in self._failing:
                    self._failing.remove(loop)
                    self._show()
                return answer

    def _failed(self, loop: str, row: "_Row", error: Exception, ran_s: float) -> float:
        """Log and count a step that raised; return the seconds to wait before it is taken again."""
        if ran_s >= STEADY_S:
            row.tries, row.faults = 0, 0
        row.tries += 1
        pause_s = doubling_s(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, row.tries, self._chance)
        if isinstance(error, AWAY):
            log.warning("%s waits for %.1f s: %s", loop, pause_s, error.message)
            return pause_s
        row.faults += 1
        self.meter.count(FAULTS, 1, self.component, loop)
        log.error("%s failed, %d in a row", loop, row.faults, exc_info=error)
        if row.faults >= FAULTS_IN_A_ROW:
            self._failing.add(loop)
            self._show()
            log.critical("%s cannot go on: the process of the %s is replaced", loop, self.component)
        return pause_s

    def _show(self) -> None:
        self.meter.set_gauge(UNHEALTHY, {(self.component,): len(self._failing)})


@dataclass(slots=True)
class _Row:
    """How often a step raised since it last succeeded, and how many of these were faults."""

    tries: int = 0
    faults: int = 0


def as_known_error(error: Exception, doing: str) -> AzuError:
    """Return an AzuError as it is; log any other exception under a new id, and return an error with this id.

    `doing` says in the log what failed, such as "a call of the registry".
    """
    if isinstance(error, AzuError):
        return error
    fault_id = f"fault-{secrets.token_hex(6)}"
    log.error("%s failed", doing, exc_info=error, extra={"fault_id": fault_id})
    return InternalError(f"azu made a mistake; its logs have the cause under {fault_id}")


def end_process() -> None:
    """End this process at once; what started it starts another in its place."""
    logging.shutdown()
    os._exit(1)
