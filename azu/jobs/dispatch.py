"""The middle of a job's life: take it from the queue, have its model deployed, run it, settle it."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from azu.config.network import RetryPolicy
from azu.errors import AzuError, DeadlineExceeded, InsufficientCapacity, InternalError, WorkerLost
from azu.jobs.record import JobRecord
from azu.jobs.settlement import Settlement
from azu.logs import bound
from azu.metrics import JOBS_ENDED, Meter
from azu.planner.plan import NEVER_FITS
from azu.protocol.job import FinishReason, Job, JobOutcome, JobRun, JobState
from azu.redis_client import retry_until_available

log = logging.getLogger(__name__)

_MAY_PASS = (InsufficientCapacity, WorkerLost, DeadlineExceeded)

Try = Callable[[], Awaitable[JobRun]]


async def keep_trying(
    once: Try,
    patience: RetryPolicy,
    *,
    wait: Callable[[float], Awaitable[bool]],
    chance: random.Random,
    clock: Callable[[], float] = time.monotonic,
) -> JobRun:
    """Try a job until it ends, waits in vain or has an error that waiting does not help.

    Every try goes on after the tokens that there are. `wait(seconds)` says whether the job is still wanted.
    """
    kept = JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR)
    tries, failed_s, had_workers = 0, clock(), False
    while True:
        run = await once()
        is_further = run.completion_tokens > kept.completion_tokens
        if is_further or not kept.completion_tokens:
            kept = run
        else:
            # This try added nothing; what was delivered before stays delivered, and paid.
            kept = replace(kept, finish_reason=run.finish_reason, error=run.error)
        had_workers = had_workers or is_further or isinstance(run.error, WorkerLost)
        if run.error is None or not _may_pass(run.error, had_workers=had_workers):
            return kept
        if is_further or not tries:
            tries, failed_s = 0, clock()
        tries += 1
        wait_s = patience.wait_s(tries, chance)
        if clock() - failed_s + wait_s > patience.budget_s:
            return replace(kept, error=_given_up(run.error, tries, clock() - failed_s))
        log.warning("tried again in %.1f s: %s", wait_s, run.error.message)
        if not await wait(wait_s):
            return replace(kept, finish_reason=FinishReason.CANCELLED, error=None)


def _may_pass(error: AzuError, *, had_workers: bool) -> bool:
    """Say whether waiting may help; what fitted once fits again when somebody joins."""
    return isinstance(error, _MAY_PASS) and (error.code != NEVER_FITS or had_workers)


def _given_up(error: AzuError, tries: int, seconds: float) -> WorkerLost:
    return WorkerLost(f"given up after {tries} tries in {seconds:.0f} s: {error.message}")


_TAKE_BLOCK_MS = 2_000
_CLAIM_IDLE_MS = 30_000


class RunningModel(Protocol):
    """A model that is deployed and takes jobs."""

    async def run(self, job: Job) -> JobRun:
        """Run a job to its end."""

    async def cancel(self, job_id: str) -> None:
        """End a job's sequence within one step."""

    def let_go(self, job_id: str) -> None:
        """Hear that nobody waits for a job here any more, whether it ran or not."""


class Deployments(Protocol):
    """Brings models up on the nodes."""

    async def ensure(self, model_id: str, revision: str, job_id: str) -> RunningModel:
        """Return the running model for a job, deploying it first when it is not; raises an AzuError."""


class JobQueue(Protocol):
    """The durable queue."""

    async def take(self, consumer: str, block_ms: int, claim_idle_ms: int) -> list[JobRecord]:
        """Return jobs that are this consumer's now, waiting up to `block_ms` for one."""

    async def take_over(self, consumer: str) -> list[JobRecord]:
        """Return every job that was taken but not done, whoever took it; they are this consumer's now."""

    async def set_state(self, job_id: str, state: JobState) -> bool:
        """Record the job's state; say whether its user gave it up before."""

    async def done(self, job_id: str) -> None:
        """Take the job out of the queue."""

    def cancellations(self) -> AsyncIterator[str]:
        """Yield the ids of jobs whose users gave them up."""


class Dispatcher:
    """Runs every queued job once, many at a time."""

    def __init__(
        self, jobs: JobQueue, deployments: Deployments, settlement: Settlement, *, consumer: str,
        patience: RetryPolicy, meter: Meter | None = None,
    ) -> None:  # fmt: skip
        self._jobs = jobs
        self._deployments = deployments
        self._settlement = settlement
        self._consumer = consumer
        self._patience = patience
        self._chance = random.Random()  # noqa: S311 - nothing secret
        self._meter = meter or Meter()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._models: dict[str, RunningModel] = {}
        self._cancelled: set[str] = set()
        self._waiting: dict[str, asyncio.Event] = {}  # jobs between two tries; set when nobody wants one

    @property
    def num_waiting(self) -> int:
        """Jobs that are taken and whose model is not up yet."""
        return len(self._running) - len(self._models)

    @property
    def num_running(self) -> int:
        """Jobs that their models have."""
        return len(self._models)

    async def run(self) -> None:
        """Take jobs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_cancellations())
            # Whoever had them before is gone: a network has one scheduler.
            records = await retry_until_available(partial(self._jobs.take_over, self._consumer))
            take = partial(self._jobs.take, self._consumer, _TAKE_BLOCK_MS, _CLAIM_IDLE_MS)
            while True:
                for record in records:
                    if record.job.job_id not in self._running:
                        task = group.create_task(self._live(record))
                        self._running[record.job.job_id] = task
                records = await retry_until_available(take)

    async def _follow_cancellations(self) -> None:
        while True:
            # From the latest ones on, when Redis was away: to cancel a job twice changes nothing.
            await retry_until_available(self._hear_cancellations)

    async def _hear_cancellations(self) -> None:
        async for job_id in self._jobs.cancellations():
            if model := self._models.get(job_id):
                await model.cancel(job_id)
            elif job_id in self._running:
                self._cancelled.add(job_id)
                if waiting := self._waiting.get(job_id):
                    waiting.set()

    async def _live(self, record: JobRecord) -> None:
        with bound(job_id=record.job.job_id, model_id=record.job.model_id):
            await self._end(record)

    async def _end(self, record: JobRecord) -> None:
        job = record.job
        log.info("taken")
        try:
            if record.outcome is None and record.ending is not None:
                await self._settlement.conclude(job, record.ending)
            elif record.outcome is None:
                if record.cancelled:
                    self._cancelled.add(job.job_id)
                run = await keep_trying(
                    partial(self._run, record),
                    self._patience,
                    wait=partial(self._wait, job),
                    chance=self._chance,
                )
                outcome = await self._settlement.settle(job, run)
                self._meter.count(JOBS_ENDED, 1, job.model_id, outcome.state.value)
                log.info("ended", extra=_told(outcome))
            await self._jobs.done(job.job_id)
        except Exception:
            # The job stays in the queue: it is claimed again once idle, and settles under the same id.
            log.exception("it did not end and will be taken again")
        finally:
            self._running.pop(job.job_id, None)
            self._models.pop(job.job_id, None)
            self._cancelled.discard(job.job_id)

    async def _wait(self, job: Job, seconds: float) -> bool:
        """Let a job wait between two tries; say whether it is still wanted."""
        self._models.pop(job.job_id, None)
        given_up = await retry_until_available(partial(self._jobs.set_state, job.job_id, JobState.QUEUED))
        if given_up or job.job_id in self._cancelled:
            return False
        self._waiting[job.job_id] = unwanted = asyncio.Event()
        try:
            await asyncio.wait_for(unwanted.wait(), seconds)
        except TimeoutError:
            return True
        finally:
            del self._waiting[job.job_id]
        return False

    async def _run(self, record: JobRecord) -> JobRun:
        job = record.job
        model: RunningModel | None = None
        try:
            model = await self._deployments.ensure(job.model_id, job.revision, job.job_id)
            given_up = await retry_until_available(
                partial(self._jobs.set_state, job.job_id, JobState.RUNNING)
            )
            given_up = given_up or job.job_id in self._cancelled
            if given_up and not record.attempts:
                return JobRun(completion_tokens=0, finish_reason=FinishReason.CANCELLED)
            # Nothing may come between: a cancellation reaches the model behind the job, or is seen above.
            self._models[job.job_id] = model
            running = asyncio.ensure_future(model.run(job))
            if given_up:
                # It ran before, and may have delivered something: the model knows.
                await asyncio.sleep(0)
                await model.cancel(job.job_id)
            return await running
        except AzuError as error:
            return JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR, error=error)
        except Exception:
            log.exception("it failed")
            internal = InternalError("the job failed for a reason that is azu's; nothing was charged")
            return JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR, error=internal)
        finally:
            if model is not None:
                model.let_go(job.job_id)


def _told(outcome: JobOutcome) -> dict[str, object]:
    return {
        "state": outcome.state.value,
        "finish_reason": outcome.finish_reason.value,
        "completion_tokens": outcome.receipt.completion_tokens,
        "charged_lamports": outcome.receipt.charged_lamports,
    }
