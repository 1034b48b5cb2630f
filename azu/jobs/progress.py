"""Progress: whether a pipeline and its jobs move as its steps predict, and what helps one that does not."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from azu.clock import wall_clock_ms
from azu.cluster.deployment import Deployment
from azu.cluster.liveness import STILL_S, STILL_STEPS
from azu.config.network import RetryPolicy
from azu.errors import AzuError, InternalError, Unavailable
from azu.protocol.job import FinishReason, Job, JobRun, PipelineLook
from azu.protocol.phase import JobPhase

log = logging.getLogger(__name__)

# An answer is on its way for less.
UNHELD_S = 10.0
# Of the time since the last look no more counts: the watchdog could not look, as when Redis is away.
_LONGEST_LOOK_S = 10.0


class Remedy(StrEnum):
    """What is done, from the mildest on.

    ASK: the pipeline does not hold the job, and is asked for it again. REPLAY: the steps on their way are
    taken again. RESTART: the pipeline's process is replaced. END: the job ends with an error. ABANDON: the
    job is waited for no longer.
    """

    ASK = "ask"
    REPLAY = "replay"
    RESTART = "restart"
    END = "end"
    ABANDON = "abandon"


@dataclass(frozen=True, slots=True)
class Standstill:
    """What does not move, and for how long: a job, or the whole pipeline where `job_id` is empty."""

    remedy: Remedy
    still_s: float
    job_id: str = ""


@dataclass(slots=True)
class _Stillness:
    """A number that changes with each move, for how long it has not, and how often this was helped.

    `still_s` counts only the time in which it could have moved, `quiet_s` all time.
    """

    value: int | None = None
    still_s: float = 0.0
    quiet_s: float = 0.0
    helped: int = 0

    def see(self, value: int | None, passed_s: float, *, can_move: bool) -> None:
        """Take the number after some time."""
        if value != self.value:
            self.value, self.still_s, self.quiet_s, self.helped = value, 0.0, 0.0, 0
            return
        self.quiet_s += passed_s
        self.still_s = self.still_s + passed_s if can_move else 0.0

    def needs_help(self, bound_s: float) -> bool:
        """Say whether it stands still for another `bound_s` since it was helped last."""
        if self.still_s < bound_s * (self.helped + 1):
            return False
        self.helped += 1
        return True


class Watchdog:
    """Watches one pipeline; it is shown what the pipeline does every few seconds.

    A job may be without a new token for `budget_s` while its pipeline is repaired. The clock is in seconds.
    """

    def __init__(self, budget_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget_s = budget_s
        self._clock = clock
        self._seen_s = clock()
        self._silent_s = 0.0
        self._pipeline = _Stillness()
        self._jobs: dict[str, _Stillness] = {}

    def look(self, expected: Collection[str], look: PipelineLook | None) -> list[Standstill]:
        """Take what the pipeline does, None while it is repaired; return what does not move.

        `expected` are the jobs whose end is waited for.
        """
        passed_s, self._silent_s = self._passed_s(), 0.0
        self._jobs = {job_id: self._jobs.get(job_id) or _Stillness() for job_id in expected}
        if look is None:
            return self._while_repaired(passed_s)
        bound_s = max(STILL_S, STILL_STEPS * look.step_s)
        # A step that is computed is waited for, however slowly: each piece has a watch of its own.
        is_in_step = look.is_computing and look.num_completed == self._pipeline.value
        counted_s = 0.0 if is_in_step else passed_s
        self._pipeline.see(look.num_completed, counted_s, can_move=bool(look.moved))
        if self._pipeline.needs_help(bound_s):
            remedy = Remedy.REPLAY if self._pipeline.helped == 1 else Remedy.RESTART
            return [Standstill(remedy, self._pipeline.still_s)]
        found = [
            self._job(job_id, mark, look, counted_s if job_id in look.moved else passed_s, bound_s)
            for job_id, mark in self._jobs.items()
        ]
        return [finding for finding in found if finding is not None]

    def no_answer(self) -> list[Standstill]:
        """Note that the pipeline does not say what it does; one that goes on so is replaced."""
        self._silent_s += self._passed_s()
        if self._silent_s < STILL_S:
            return []
        silent_s, self._silent_s = self._silent_s, 0.0
        return [Standstill(Remedy.RESTART, silent_s)]

    def _passed_s(self) -> float:
        before_s, self._seen_s = self._seen_s, self._clock()
        return min(_LONGEST_LOOK_S, self._seen_s - before_s)

    def _while_repaired(self, passed_s: float) -> list[Standstill]:
        self._pipeline = _Stillness()
        found = []
        for job_id, mark in self._jobs.items():
            mark.see(mark.value, passed_s, can_move=False)
            if mark.quiet_s >= self._budget_s:
                found.append(Standstill(Remedy.ABANDON, mark.quiet_s, job_id))
        return found

    def _job(
        self, job_id: str, mark: _Stillness, look: PipelineLook, passed_s: float, bound_s: float
    ) -> Standstill | None:
        moved = look.moved.get(job_id)
        # Where the whole pipeline stands still it is not the job that has to be helped.
        can_move = moved is None or (job_id not in look.no_room and self._pipeline.still_s < bound_s)
        mark.see(moved, passed_s, can_move=can_move)
        if moved is None:
            return Standstill(Remedy.ASK, mark.still_s, job_id) if mark.needs_help(UNHELD_S) else None
        if not mark.needs_help(bound_s):
            return None
        remedies: Mapping[int, Remedy] = {1: Remedy.REPLAY, 2: Remedy.END}
        return Standstill(remedies.get(mark.helped, Remedy.ABANDON), mark.still_s, job_id)


class RunningJob:
    """A job in a deployment, whose end is waited for."""

    def __init__(self, job: Job, deployment: Deployment) -> None:
        self.job = job
        self.deployment = deployment
        self._call: asyncio.Future[JobRun] | None = None
        self._is_asked_again = False
        self._error: AzuError | None = None

    async def run(self) -> JobRun:
        """Run the job to its end, or until it is abandoned: then nothing is known of its work."""
        while self._error is None:
            self._is_asked_again = False
            self._call = asyncio.ensure_future(self.deployment.run(self.job))
            try:
                return await self._call
            except asyncio.CancelledError:
                if self._error is None and not self._is_asked_again:
                    raise
        return JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR, error=self._error)

    def ask_again(self) -> None:
        """Ask the deployment again for the job; one that runs it gives the same answer."""
        self._is_asked_again = True
        self._stop_waiting()

    def abandon(self, error: AzuError) -> None:
        """Wait for the job no longer."""
        self._error = error
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._call is not None:
            self._call.cancel()


class ProgressWatch:
    """Looks at the pipelines that run jobs, and helps what does not move."""

    def __init__(
        self,
        running: Mapping[str, RunningJob],
        patience: RetryPolicy,
        *,
        clock: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        """Watch the jobs of `running`, which its owner changes."""
        self._running = running
        self._patience = patience
        self._clock = clock
        self._now_ms = now_ms
        self._watchdogs: dict[Deployment, Watchdog] = {}
        self._phases: dict[str, JobPhase] = {}

    def phases(self) -> dict[str, JobPhase | None]:
        """Return where each running job stands; None once it has tokens and its model serves."""
        # A deployment goes over all its pieces and their shards for it: once, however many jobs it has.
        found = {one: one.phase for one in {running.deployment for running in self._running.values()}}
        return {
            job_id: found[one.deployment] or self._phases.get(job_id) for job_id, one in self._running.items()
        }

    async def look(self) -> None:
        """Look once at every pipeline with a job."""
        self._phases = {one: phase for one, phase in self._phases.items() if one in self._running}
        jobs = defaultdict[Deployment, list[str]](list)
        for job_id, one in self._running.items():
            jobs[one.deployment].append(job_id)
        self._watchdogs = {
            deployment: self._watchdogs.get(deployment) or Watchdog(self._patience.budget_s, self._clock)
            for deployment in jobs
        }
        await asyncio.gather(*(self._look_at(*one) for one in jobs.items()))

    async def _look_at(self, deployment: Deployment, expected: Collection[str]) -> None:
        watchdog = self._watchdogs[deployment]
        try:
            look = await deployment.look()
        except AzuError as error:
            log.warning("%s", error.message)  # the deployment notices one that died, and replaces it
            findings = watchdog.no_answer()
        else:
            for job_id in expected:
                self._phases.pop(job_id, None)
            if look is not None:
                self._phases |= {one: phase for one, phase in look.phases.items() if one in self._running}
            findings = watchdog.look(expected, look)
        for finding in findings:
            await self._help(deployment, finding)
        for job_id in expected:
            if (one := self._running.get(job_id)) is not None and self.is_too_old(one.job):
                await _end(one, too_old(self._patience.job_s))

    async def _help(self, deployment: Deployment, finding: Standstill) -> None:
        what = finding.job_id or f"the pipeline of {deployment.structure.model_id}"
        log.error("%s stood still for %.0f s: %s", what, finding.still_s, finding.remedy.value)
        one = self._running.get(finding.job_id)
        match finding.remedy:
            case Remedy.REPLAY:
                deployment.pipeline_lost()
            case Remedy.RESTART:
                deployment.restart_pipeline()
            case Remedy.ASK if one is not None:
                one.ask_again()
            case Remedy.END if one is not None:
                error = f"the job stood still for {finding.still_s:.0f} s while others of its model moved"
                await _end(one, InternalError(error))
            case Remedy.ABANDON if one is not None:
                error = f"the job had no new token for {finding.still_s:.0f} s and was given up"
                one.abandon(Unavailable(error, code="worker_lost"))
                await deployment.pipeline.cancel(finding.job_id)

    def is_too_old(self, job: Job) -> bool:
        """Say whether a job has used up its whole time."""
        return self._now_ms() - job.created_at_ms > self._patience.job_s * 1000


async def _end(one: RunningJob, error: AzuError) -> None:
    try:
        await one.deployment.pipeline.end(one.job.job_id, error)
    except AzuError as fault:
        log.warning("%s is abandoned: %s", one.job.job_id, fault.message)
        one.abandon(error)


def too_old(job_s: float) -> AzuError:
    """Return the error of a job that has used up its whole time."""
    return Unavailable(f"the job did not end within {job_s:.0f} s", code="deadline_exceeded")
