"""The pipeline that a deployment has now: its jobs wait for a successor when it dies, and go on there."""

import asyncio
import logging
from collections.abc import Callable

from azu.cluster.backend import DeploymentBackend
from azu.engine.canary import CanaryAnswer
from azu.errors import AzuError, WorkerLost
from azu.protocol.job import Job, JobRun
from azu.supervision import AWAY

log = logging.getLogger(__name__)

_CANCEL_TRIES = 3
_CANCEL_AGAIN_S = 0.25


class CurrentPipeline:
    """Knows the name of the pipeline actor, and the jobs that run in it or are expected to."""

    def __init__(self, backend: DeploymentBackend) -> None:
        self._backend = backend
        self._name: str | None = None
        self._fault: AzuError | None = None
        self._num_started = 0
        self._changed = asyncio.Condition()
        # Jobs that are expected here, and jobs that run or ran here without coming to an end.
        self._expected: set[str] = set()
        self._held: frozenset[str] = frozenset()

    # The actor

    @property
    def is_started(self) -> bool:
        """Whether a pipeline was started, be it alive or not."""
        return self._name is not None

    @property
    def name(self) -> str:
        """The name of its actor."""
        assert self._name is not None, "a pipeline is started first"
        return self._name

    async def replace(self, name: str) -> None:
        """Take a pipeline that was started or found; jobs that wait go on in it."""
        self._name = name
        self._num_started += 1
        await self.notify()

    async def adopt(self, name: str) -> None:
        """Take over a pipeline that another scheduler started, with the jobs that it still has."""
        await self.replace(name)
        try:
            self._held = await self._backend.running_jobs(name)
        except AzuError as error:
            log.warning("%s", error.message)
        # The jobs are taken again in a moment: a deployment that has them is not idle meanwhile.
        self._expected |= self._held

    def kill(self) -> None:
        """Kill the actor, where there is one."""
        if self._name is not None:
            self._backend.kill(self._name)

    async def fail(self, error: AzuError) -> None:
        """End every job with what was delivered and this error; there will be no successor."""
        self._fault = error
        if self._name is not None:
            self._backend.fail(self._name, error)
        await self.notify()

    async def notify(self) -> None:
        """Have each caller of `until` look at its condition again."""
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; raises the fault once there will be no successor."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._fault is not None or condition())
        if self._fault is not None:
            raise self._fault

    # Its jobs

    @property
    def num_expected(self) -> int:
        """The number of jobs that are expected here and were not let go."""
        return len(self._expected)

    @property
    def jobs(self) -> frozenset[str]:
        """The jobs that are expected here, and those that run or ran here without coming to an end."""
        return self._held | self._expected

    def expect(self, job_id: str) -> None:
        """Count a job that is going to run here."""
        self._expected.add(job_id)

    def let_go(self, job_id: str) -> None:
        """Count a job no longer, whether it ran or not."""
        self._expected.discard(job_id)

    def drop(self, job_id: str) -> bool:
        """Forget a job that is over; say whether it may still run here, and is to be cancelled."""
        self.let_go(job_id)
        was_held = job_id in self._held
        self._held -= {job_id}
        return was_held

    async def run(self, job: Job) -> JobRun:
        """Run a job to its end, also when the pipeline dies; raises the fault when there is no successor."""
        self._held |= {job.job_id}
        while True:
            num_started = self._num_started
            try:
                if self._name is not None:
                    run = await self._backend.run(self._name, job)
                    self._held -= {job.job_id}
                    return run
            except WorkerLost as error:
                log.warning("%s: %s waits for another pipeline", error.message, job.job_id)
            await self._another(num_started)

    async def _another(self, num_started: int) -> None:
        """Wait for a pipeline beyond the first `num_started`."""
        await self.until(lambda: self._num_started > num_started)

    async def cancel(self, job_id: str) -> None:
        """End a job's sequences; a pipeline that is started later reads that the job was cancelled."""
        for attempt in range(_CANCEL_TRIES):
            if attempt:
                await asyncio.sleep(_CANCEL_AGAIN_S)
            try:
                if self._name is not None:
                    await self._backend.cancel(self._name, job_id)
                return
            except AWAY as error:
                log.info("%s: its successor will not run %s", error.message, job_id)
                return
            except AzuError as error:
                # A pipeline that lives has the job computed to its end.
                log.warning("%s was not cancelled: %s", job_id, error.message)
        log.error("%s runs on: its pipeline did not cancel it", job_id)

    async def end(self, job_id: str, error: AzuError) -> None:
        """End a job with what was delivered, and this error. Raises an AzuError when the pipeline is away."""
        await self._backend.end(self.name, job_id, error)

    async def canary(self) -> CanaryAnswer:
        """Continue the canary's prompts; raises an AzuError when there is no answer."""
        return await self._backend.canary(self.name)
