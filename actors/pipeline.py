"""Pipeline: the loop of one deployed model. Token ids pass through here, hidden states never do."""

import asyncio
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from contextlib import suppress
from dataclasses import replace
from functools import partial

import ray
from ray.actor import ActorHandle

from actors.links import as_azu_error
from actors.placement import CONTROL
from actors.telemetry import log_as, open_meter
from azu.engine.pipeline import EnginePipeline, SequenceUpdate
from azu.engine.scheduler import SchedulerConfig, Sequence
from azu.engine.text import TextDecoder
from azu.engine.timing import PipelineMetrics
from azu.errors import AzuError
from azu.jobs.job_runner import _KEPT_JOBS, _SEED_RANGE, _ActiveJob
from azu.jobs.redis import RedisJobs
from azu.protocol.job import FinishReason, Job, JobRun, TokenEvent
from azu.protocol.step import StepResult
from azu.protocol.structure import Structure
from azu.protocol.topology import PieceSet, Topology
from azu.redis_client import retry_until_available

log = logging.getLogger(__name__)


class Pipeline:
    """Wraps an EnginePipeline: jobs in, steps to the first stage, tokens to Redis."""

    def __init__(
        self,
        structure: Structure,
        topology: Topology,
        scheduling: SchedulerConfig,
        eos_token_ids: Ordered[int],
        text_decoder: str,
        redis_url: str,
        step_timeout_s: float,
    ) -> None:
        log_as("pipeline", model_id=structure.model_id)
        self._epoch = topology.epoch
        self._engine = EnginePipeline(structure, topology, scheduling, eos_token_ids)
        meter = open_meter(lambda: self._pace.set_load(self._engine))
        self._pace = PipelineMetrics(structure.model_id, scheduling.num_blocks, meter)
        self._text = TextDecoder.from_json(text_decoder)
        self._jobs = RedisJobs.from_url(redis_url)
        self._step_timeout_s = step_timeout_s
        self._ids = itertools.count(1)
        self._running: dict[int, tuple[_ActiveJob, int]] = {}  # by sequence, with the choice that it is
        self._jobs_by_id: OrderedDict[str, _ActiveJob] = OrderedDict()  # those that ended lately too
        self._updates: asyncio.Queue[list[SequenceUpdate]] = asyncio.Queue()
        self._broken: AzuError | None = None
        self._stages: Ordered[ActorHandle] = ()
        self._losses: deque[tuple[PieceSet, int, bool]] = deque()
        self._lost = asyncio.Event()
        self._is_paused = False
        self._watchers: set[asyncio.Task[None]] = set()

    async def start(self, stages: Ordered[ActorHandle]) -> None:
        """Learn the stages, in order, and begin to write tokens."""
        self._stages = stages
        self._writer = asyncio.create_task(self._write())

    async def run(self, job: Job) -> JobRun:
        """Run a job from what is written of it to its end; its tokens are in Redis when this returns.

        Whoever asks again for a job that runs here, or ended here lately, gets the same answer.
        """
        running = self._jobs_by_id.get(job.job_id)
        if running is None:
            running = _ActiveJob(job, asyncio.get_running_loop().create_future())
            self._jobs_by_id[job.job_id] = running
            try:
                await self._begin(running)
            except Exception as error:
                del self._jobs_by_id[job.job_id]
                running.ended.set_exception(error)
        return await asyncio.shield(running.ended)

    async def jobs(self) -> frozenset[str]:
        """Return the jobs that have not ended here."""
        return frozenset(job_id for job_id, one in self._jobs_by_id.items() if not one.ended.done())

    async def cancel(self, job_id: str) -> None:
        """End a job's sequences within one step; what was delivered stays delivered."""
        if running := self._jobs_by_id.get(job_id):
            running.cancelled = True
            for sequence_id in running.open:
                self._updates.put_nowait(self._engine.cancel(sequence_id))
            self._pump()

    async def completed(self, result: StepResult) -> None:
        """Take the last stage's tokens."""
        updates = self._engine.complete(result)
        # The next step leaves before the tokens of this one are written down.
        self._pump()
        self._updates.put_nowait(updates)

    async def lost(self, loss: PieceSet, fault: str, epoch: int, bad_frame: bool = False) -> None:
        """Hear that pieces failed, are gone or sent a bad frame: nothing is scheduled until `resume`."""
        if epoch != self._epoch or self._is_paused:
            return  # whoever was running then is repaired already
        log.warning("%s: %s", loss, fault)
        self._engine.suspend()
        self._losses.append((loss, epoch, bad_frame))
        self._lost.set()

    async def next_loss(self, wait_s: float) -> tuple[PieceSet, int, bool]:
        """Return what the stages report as lost, from which epoch, and whether for a bad frame.

        Nothing is lost if nothing is reported for `wait_s`.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self._lost.wait(), wait_s)
        if not self._losses:
            return PieceSet(), self._epoch, False
        reported = self._losses.popleft()
        if not self._losses:
            self._lost.clear()
        return reported

    async def limit(self, num_blocks: int) -> int:
        """Take no sequence that `num_blocks` would not hold alone; return how many are needed still."""
        return self._engine.limit(num_blocks)

    async def pause(self) -> int:
        """Schedule nothing until `resume`, forget what is in flight; return how many steps were completed."""
        self._is_paused = True
        self._engine.suspend()
        return self._engine.num_completed

    async def resume(
        self, topology: Topology, stages: Ordered[ActorHandle], empty_stages: frozenset[int], is_repair: bool
    ) -> None:
        """Go on under a newer topology: empty stages are filled, then every sequence goes on as it stood."""
        empty = (empty_stages | self._engine.unfilled_stages) & frozenset(range(len(stages)))
        cached = tuple(self._engine.num_cached)
        senders = sorted({stage - 1 for stage in empty if stage})
        num_sent = await asyncio.gather(*(self._num_sent(stages[sender], cached) for sender in senders))
        if topology.epoch <= self._epoch:
            return  # from a scheduler that died meanwhile
        self._epoch = topology.epoch
        self._is_paused = False
        self._stages = stages
        self._engine.suspend()
        self._engine.resume(topology, empty, dict(zip(senders, num_sent, strict=True)))
        if is_repair:
            self._pace.record_recovery()
        self._pump()

    async def fail(self, error: AzuError) -> None:
        """End everything that runs here with what it has."""
        self._broken = error
        self._pace.record_recovery(given_up=True)
        self._engine.suspend()
        self._updates.put_nowait(
            [update for sequence_id in self._running for update in self._engine.cancel(sequence_id)]
        )

    async def _num_sent(self, stage: ActorHandle, sequence_ids: Ordered[int]) -> Mapping[int, int]:
        asking = stage.num_sent.options(concurrency_group=CONTROL).remote(sequence_ids)
        try:
            num_sent: Mapping[int, int] = await asyncio.wait_for(asking, self._step_timeout_s)
        except Exception as error:
            # Without its rows everything is computed again; if it is gone, that is noticed elsewhere.
            log.warning("a stage does not say what it can send again: %s", type(error).__name__)
            return {}
        return num_sent

    async def _begin(self, running: _ActiveJob) -> None:
        job = running.job
        known = await retry_until_available(partial(self._jobs.progress, job))
        running.delivered = known.delivered
        running.cancelled |= known.cancelled
        for choice, so_far in enumerate(known.choices):
            if so_far.finish_reason is not None:
                running.choice_ended(so_far.finish_reason, so_far.work)
            elif self._broken is not None or running.cancelled:
                work = self._engine.presumed_work(len(job.prompt_token_ids), len(so_far.token_ids))
                running.choice_ended(FinishReason.CANCELLED, work)
            else:
                sequence = self._sequence(job, choice, so_far.token_ids)
                self._engine.add(sequence)
                self._pace.record_start(sequence.sequence_id, len(job.prompt_token_ids), time.monotonic())
                self._running[sequence.sequence_id] = (running, choice)
                running.open.add(sequence.sequence_id)
                log.info("began", extra={"job_id": job.job_id, "sequence_id": sequence.sequence_id})
        self._end_if_over(running)
        self._pump()

    def _sequence(self, job: Job, choice: int, generated: tuple[int, ...]) -> Sequence:
        # The first choice is what the job would get if it asked for one.
        sampling = replace(job.sampling, seed=(job.sampling.seed + choice) % _SEED_RANGE)
        text = self._text.completion(job.prompt_token_ids, sampling) if sampling.stop else None
        ends_with = text.ends_with if text else None
        return Sequence(next(self._ids), job.prompt_token_ids, sampling, generated, ends_with)

    def _pump(self) -> None:
        while self._broken is None and (batch := self._engine.next_batch()) is not None:
            stage = max(0, batch.replay.first - 1) if batch.replay else 0
            sent = self._stages[stage].step.remote(batch, None)
            watcher = asyncio.create_task(self._watch(sent, stage, batch.epoch))
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)

    async def _watch(self, acknowledgement: ray.ObjectRef, stage: int, epoch: int) -> None:
        try:
            await asyncio.wait_for(acknowledgement, self._step_timeout_s)
        except Exception as error:
            fault = as_azu_error(error, f"stage {stage}")
            await self.lost(PieceSet(stages=frozenset({stage})), fault.message, epoch)

    async def _write(self) -> None:
        while True:
            updates = await self._updates.get()
            while not self._updates.empty():
                updates = updates + self._updates.get_nowait()
            self._pace.record_tokens(updates, time.monotonic())
            events = []
            for update in updates:
                running, choice = self._running[update.sequence_id]
                if update.token_ids:
                    event = TokenEvent(
                        index=running.delivered,
                        token_ids=update.token_ids,
                        logprobs=update.logprobs,
                        top_logprobs=update.top_logprobs,
                        choice=choice,
                        finish_reason=update.finish_reason,
                        work=update.work,
                    )
                    events.append((running.job.job_id, event))
                    running.delivered += len(update.token_ids)
            await retry_until_available(partial(self._jobs.append, events))
            for update in updates:
                if update.finish_reason is not None:
                    running, _ = self._running.pop(update.sequence_id)
                    running.open.remove(update.sequence_id)
                    ids = {"job_id": running.job.job_id, "sequence_id": update.sequence_id}
                    log.info("ended", extra=ids | {"finish_reason": update.finish_reason.value})
                    running.choice_ended(update.finish_reason, update.work)
                    self._end_if_over(running)

    def _end_if_over(self, running: _ActiveJob) -> None:
        if running.open:
            return
        running.end(self._broken)
        while len(self._jobs_by_id) > _KEPT_JOBS:
            oldest = next(iter(self._jobs_by_id.values()))
            if not oldest.ended.done():
                break
            self._jobs_by_id.popitem(last=False)
