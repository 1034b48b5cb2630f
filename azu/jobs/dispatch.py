"""The middle of a job's life: take it from the queue, have its model deployed, run it, settle it."""

import asyncio
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from azu.cluster.cluster import Cluster
from azu.cluster.deployment import Deployment
from azu.config.network import RetryPolicy
from azu.errors import AzuError, DeadlineExceeded, InsufficientCapacity, NotFound, NumericsError, WorkerLost
from azu.jobs.departures import MOST_RETURNS
from azu.jobs.progress import ProgressWatch, RunningJob, too_old
from azu.jobs.record import MOST_FAULTS, JobRecord
from azu.jobs.redis import RedisJobs
from azu.jobs.run_check import checked
from azu.jobs.settlement import Settlement
from azu.logs import log_context
from azu.metrics import JOBS_ENDED
from azu.planner.plan import NEVER_FITS
from azu.protocol.job import FinishReason, Job, JobOutcome, JobRun, JobState
from azu.protocol.phase import JobPhase
from azu.redis_client import retry_until_available
from azu.supervision import AWAY, Supervisor, as_known_error

log = logging.getLogger(__name__)

_TAKE_BLOCK_MS = 2_000
_LOOK_S = 2.0
_CLAIM_IDLE_MS = 30_000
# The time until a job whose end failed is tried again.
_FAULT_PAUSE_S = 1.0
# Errors that may pass while a job waits.
_TRANSIENT = (InsufficientCapacity, WorkerLost, DeadlineExceeded)

Try = Callable[[], Awaitable[JobRun]]


class Dispatcher:
    """Runs every queued job once, many at a time."""

    def __init__(
        self, jobs: RedisJobs, cluster: Cluster, settlement: Settlement, *, consumer: str,
        patience: RetryPolicy, supervisor: Supervisor,
    ) -> None:  # fmt: skip
        self._jobs = jobs
        self._cluster = cluster
        self._settlement = settlement
        self._consumer = consumer
        self._patience = patience
        self._chance = random.Random()  # noqa: S311 - nothing secret
        self._supervisor = supervisor
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, RunningJob] = {}
        self._progress = ProgressWatch(self._running, patience)
        self._failed: dict[str, str] = {}  # why the last try of a job failed
        self._models: dict[str, tuple[str, str]] = {}  # of the jobs that are taken: ids and revisions
        self._told: dict[str, JobPhase | None] = {}  # where jobs stand, as far as it is written
        self._cancelled: set[str] = set()
        # By deployment, the jobs that are to be cancelled there; a task of its own takes them.
        self._cancelling: dict[Deployment, set[str]] = {}
        self._taken_over: set[str] = set()  # jobs of an earlier scheduler, whose nodes may not be back yet
        self._waiting: dict[str, asyncio.Event] = {}  # jobs between two tries; set when one is cancelled
        self._left: dict[str, asyncio.Event] = {}  # jobs that wait for their clients; set when there is news

    @property
    def num_waiting(self) -> int:
        """Jobs that are taken and whose model is not up yet."""
        return len(self._tasks) - len(self._running) - len(self._left)

    @property
    def num_running(self) -> int:
        """Jobs that run in a deployment."""
        return len(self._running)

    async def run(self) -> None:
        """Take jobs until cancelled."""
        async with asyncio.TaskGroup() as group:
            # From the latest ones on, after a fault: to cancel a job twice changes nothing.
            cancellations = partial(self._take_cancellations, group)
            group.create_task(self._supervisor.keep("cancellations", cancellations))
            # An earlier scheduler that had taken jobs is gone: a network has one scheduler.
            await self._supervisor.insist("jobs", partial(self._take_over, group))
            look = partial(self._look, group)
            group.create_task(self._supervisor.keep("progress", look, every_s=_LOOK_S))
            await self._supervisor.keep("jobs", partial(self._take, group))

    async def _take_over(self, group: asyncio.TaskGroup) -> None:
        records = await self._jobs.take_over(self._consumer)
        self._taken_over |= {record.job.job_id for record in records}
        self._begin(records, group)

    async def _take(self, group: asyncio.TaskGroup) -> None:
        taken = await self._jobs.take(self._consumer, _TAKE_BLOCK_MS, _CLAIM_IDLE_MS, self._tasks)
        self._begin(taken, group)

    def _begin(self, records: Iterable[JobRecord], group: asyncio.TaskGroup) -> None:
        for record in records:
            if record.job.job_id not in self._tasks:
                self._models[record.job.job_id] = (record.job.model_id, record.job.revision)
                self._tasks[record.job.job_id] = group.create_task(self._finish(record))

    async def _take_cancellations(self, group: asyncio.TaskGroup) -> None:
        async for job_id, is_back in self._jobs.cancellations():
            if left := self._left.get(job_id):
                left.set()
            elif is_back:
                continue  # it is seen when the job's run has ended
            elif running := self._running.get(job_id):
                self._cancel(running.deployment, job_id, group)
            elif job_id in self._tasks:
                self._cancelled.add(job_id)
                if waiting := self._waiting.get(job_id):
                    waiting.set()

    def _cancel(self, deployment: Deployment, job_id: str, group: asyncio.TaskGroup) -> None:
        """Cancel a running job; a pipeline that hangs holds up only its own jobs."""
        if deployment not in self._cancelling:
            self._cancelling[deployment] = set()
            group.create_task(self._cancel_in(deployment))
        self._cancelling[deployment].add(job_id)

    async def _cancel_in(self, deployment: Deployment) -> None:
        job_ids = self._cancelling[deployment]
        while job_ids:
            taken = [job_ids.pop() for _ in range(len(job_ids))]
            await self._supervisor.insist("cancellations", partial(_cancel_all, deployment, taken))
        del self._cancelling[deployment]

    async def _look(self, group: asyncio.TaskGroup) -> None:
        """Write where jobs stand, help what does not move, and end in pipelines what is over.

        All of it waits for a Redis that is away: what stands still without it needs no help.
        """
        try:
            await self._tell()
        except AWAY:
            raise
        except Exception as error:
            log.warning("%s", as_known_error(error, "a look at where jobs stand").message)
        await self._progress.look()
        for deployment, job_id in self._cluster.keep_jobs(self._tasks):
            self._cancel(deployment, job_id, group)

    async def _tell(self) -> None:
        phases = await self._phases()
        unknown = object()
        changed = {
            job_id: phase for job_id, phase in phases.items() if phase != self._told.get(job_id, unknown)
        }
        await self._jobs.explain(changed)
        self._told = phases

    async def _phases(self) -> dict[str, JobPhase | None]:
        """Return where each job stands that is taken; None once it has tokens and its model serves."""
        started = self._models.keys() - self._left.keys() - self._running.keys() - self._waiting.keys()
        models = {self._models[job_id] for job_id in started}
        found = await asyncio.gather(*(self._cluster.phase_of(*model) for model in models))
        starting, running = dict(zip(models, found, strict=True)), self._progress.phases()
        return {
            job_id: running[job_id] if job_id in running else self._phase(job_id, starting.get(model))
            for job_id, model in self._models.items()
        }

    def _phase(self, job_id: str, starting: JobPhase | None) -> JobPhase | None:
        if job_id in self._left:
            text = "Its client hung up. The same request, sent again soon, goes on with it."
            return JobPhase("queued", text)
        if job_id in self._waiting:
            why = self._failed.get(job_id, "")
            return JobPhase("queued", f"{why[:1].upper()}{why[1:]}; it is tried again soon.")
        return starting

    async def _finish(self, taken: JobRecord) -> None:
        """Bring a job that was taken from the queue to its end, whatever is raised on the way.

        It is tried again after an error, under the same transfer id. The third error that is not another
        service's silence ends the job.
        """
        record: JobRecord | None = taken
        job = taken.job
        with log_context(job_id=job.job_id, model_id=job.model_id):
            log.info("taken")
            try:
                while record is not None and not await self._has_ended(record):
                    await asyncio.sleep(_FAULT_PAUSE_S)
                    record = await retry_until_available(partial(self._jobs.get, job.job_id))
            except Exception as error:
                # It stays in the queue, and is claimed again once it was idle.
                as_known_error(error, "a job that is tried again")
            finally:
                self._tasks.pop(job.job_id, None)
                self._models.pop(job.job_id, None)
                self._running.pop(job.job_id, None)
                self._failed.pop(job.job_id, None)
                self._cancelled.discard(job.job_id)
                self._taken_over.discard(job.job_id)

    async def _has_ended(self, record: JobRecord) -> bool:
        """Try to bring a job to its end and out of the queue; say if that is done."""
        job = record.job
        try:
            if record.outcome is None and not await self._was_ended(record):
                if record.cancelled:
                    self._cancelled.add(job.job_id)
                await self._run_and_settle(record)
            await retry_until_available(partial(self._jobs.done, job.job_id))
        except NotFound:
            log.warning("Redis lost the job with its last writes")
            await retry_until_available(partial(self._settlement.lose, job))
        except AWAY as error:
            log.warning("the job did not end and is tried again: %s", error.message)
            return False
        except Exception as error:
            known = as_known_error(error, "the end of the job")
            faults = await retry_until_available(partial(self._jobs.count_fault, job.job_id))
            if faults < MOST_FAULTS:
                return False
            await self._settlement.give_up(job, known)
            await self._jobs.done(job.job_id)
        return True

    async def _was_ended(self, record: JobRecord) -> bool:
        """End a job that ran before as the books ended it, if they did: its outcome may have been lost."""
        if not record.attempts:
            return False
        return await retry_until_available(partial(self._settlement.take_back, record.job))

    async def _run_and_settle(self, record: JobRecord) -> None:
        job = record.job
        run, returns = await self._run(record), 0
        # A pipeline may also call a job cancelled without a reason: it does not run for ever.
        while run.finish_reason is FinishReason.CANCELLED and returns <= MOST_RETURNS:
            if not await self._comes_back(job):
                break
            run, returns = _both(run, await self._run(record)), returns + 1
        if run.finish_reason is FinishReason.CANCELLED and not await retry_until_available(
            partial(self._jobs.client_left, job.job_id)
        ):
            run = replace(run, prompt_tokens_ran=0)  # azu itself ended it
        outcome = await retry_until_available(partial(self._settlement.settle, job, run))
        self._supervisor.meter.count(JOBS_ENDED, 1, job.model_id, outcome.state.value)
        log.info("ended", extra=_outcome_fields(outcome))

    async def _run(self, record: JobRecord) -> JobRun:
        return await keep_trying(
            partial(self._try, record),
            self._patience,
            wait=partial(self._wait, record.job),
            chance=self._chance,
            had_workers=record.job.job_id in self._taken_over,
        )

    async def _comes_back(self, job: Job) -> bool:
        """Wait while the client of a cancelled job may send its request again; say whether it did."""
        self._running.pop(job.job_id, None)
        self._left[job.job_id] = news = asyncio.Event()
        try:
            await retry_until_available(partial(self._jobs.set_state, job.job_id, JobState.QUEUED))
            while (wait_s := await retry_until_available(partial(self._jobs.left_for, job.job_id))) > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), wait_s)
                news.clear()
        finally:
            del self._left[job.job_id]
        if wait_s < 0:
            self._cancelled.discard(job.job_id)
        return wait_s < 0

    async def _try(self, record: JobRecord) -> JobRun:
        """Run a job once in its model's deployment; an error becomes part of the run."""
        job = record.job
        deployment: Deployment | None = None
        try:
            if self._progress.is_too_old(job):
                raise too_old(self._patience.job_s)
            deployment = await self._deployed(job)
            cancelled = await retry_until_available(
                partial(self._jobs.set_state, job.job_id, JobState.RUNNING)
            )
            cancelled = cancelled or job.job_id in self._cancelled
            if cancelled and not record.attempts:
                return JobRun(completion_tokens=0, finish_reason=FinishReason.CANCELLED)
            # No await may come between: a cancellation comes behind the job, or is seen above.
            self._running[job.job_id] = one = RunningJob(job, deployment)
            running = asyncio.ensure_future(one.run())
            if cancelled:
                # The job ran before and may have delivered something: the deployment knows.
                await asyncio.sleep(0)
                await deployment.pipeline.cancel(job.job_id)
            run = checked(await running, job)
            if isinstance(run.error, NumericsError) and (other := self._cluster.beside(deployment)):
                return await self._in_another(job, run.error, deployment, other)
            return run
        except Exception as error:
            known = as_known_error(error, "the job")
            self._failed[job.job_id] = known.message
            return JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR, error=known)
        finally:
            if deployment is not None:
                deployment.pipeline.let_go(job.job_id)

    async def _deployed(self, job: Job) -> Deployment:
        """Return a deployment of the job's model; raises DeadlineExceeded when none comes up in time."""
        try:
            async with asyncio.timeout(self._patience.load_s):
                return await self._cluster.ensure(job.model_id, job.revision, job.job_id)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{job.model_id} was not up in {self._patience.load_s:.0f} s") from error

    async def _in_another(
        self, job: Job, error: NumericsError, first: Deployment, other: Deployment
    ) -> JobRun:
        """Go on in another deployment after values that are not finite; blame the first where it has them."""
        other.pipeline.expect(job.job_id)
        self._running[job.job_id] = one = RunningJob(job, other)
        try:
            run = checked(await one.run(), job)
        finally:
            other.pipeline.let_go(job.job_id)
        if run.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            first.blame(error.node_id)
        return run

    async def _wait(self, job: Job, seconds: float) -> bool:
        """Let a job wait between two tries; say whether it is still wanted."""
        self._running.pop(job.job_id, None)
        cancelled = await retry_until_available(partial(self._jobs.set_state, job.job_id, JobState.QUEUED))
        if cancelled or job.job_id in self._cancelled:
            return False
        self._waiting[job.job_id] = unwanted = asyncio.Event()
        try:
            await asyncio.wait_for(unwanted.wait(), seconds)
        except TimeoutError:
            return True
        finally:
            del self._waiting[job.job_id]
        return False


async def keep_trying(
    once: Try,
    patience: RetryPolicy,
    *,
    wait: Callable[[float], Awaitable[bool]],
    chance: random.Random,
    had_workers: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> JobRun:
    """Try a job until it ends, waits in vain or has an error that waiting does not help.

    Every try goes on after the tokens that there are. `wait(seconds)` says whether the job is still wanted. A
    job that `had_workers` waits until they are back.
    """
    kept = JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR)
    tries, failed_s = 0, clock()
    while True:
        run = await once()
        is_further = run.completion_tokens > kept.completion_tokens
        if is_further or _came_as_far(run, kept):
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
        log.warning("the job is tried again in %.1f s: %s", wait_s, run.error.message)
        if not await wait(wait_s):
            return replace(kept, finish_reason=FinishReason.CANCELLED, error=None)


async def _cancel_all(deployment: Deployment, job_ids: Iterable[str]) -> None:
    await asyncio.gather(*(deployment.pipeline.cancel(job_id) for job_id in job_ids))


def _both(before: JobRun, after: JobRun) -> JobRun:
    """Return the run of a job whose client left and came back: it ends as its second part does."""
    work = defaultdict[int, Counter[str]](Counter)
    for layer, by_node in (*before.work.items(), *after.work.items()):
        work[layer].update(by_node)
    return replace(
        after,
        completion_tokens=max(before.completion_tokens, after.completion_tokens),
        prompt_tokens_ran=max(before.prompt_tokens_ran, after.prompt_tokens_ran),
        work=work,
        placements=after.placements or before.placements,
    )


def _came_as_far(run: JobRun, kept: JobRun) -> bool:
    """Say whether a try that brought no token is to be kept instead of the tries before it."""
    return not kept.completion_tokens and run.prompt_tokens_ran >= kept.prompt_tokens_ran


def _may_pass(error: AzuError, *, had_workers: bool) -> bool:
    """Say whether waiting may help; a model that fitted once fits again when nodes join."""
    return isinstance(error, _TRANSIENT) and (error.code != NEVER_FITS or had_workers)


def _given_up(error: AzuError, tries: int, seconds: float) -> WorkerLost:
    return WorkerLost(f"given up after {tries} tries in {seconds:.0f} s: {error.message}")


def _outcome_fields(outcome: JobOutcome) -> dict[str, object]:
    return {
        "state": outcome.state.value,
        "finish_reason": outcome.finish_reason.value,
        "completion_tokens": outcome.receipt.completion_tokens,
        "charged_lamports": outcome.receipt.charged_lamports,
    }
