"""Pipeline: the loop of one deployed model. Token ids pass through here, hidden states never do."""

import asyncio
import itertools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field, replace

import ray
from ray.actor import ActorHandle

from actors.link import as_azu_error
from actors.metrics import open_meter
from actors.placement import CONTROL
from azu.engine.pace import Pace
from azu.engine.pipeline import EnginePipeline, SequenceUpdate
from azu.engine.scheduler import SchedulerConfig
from azu.engine.sequence import Sequence
from azu.engine.text_decoder import TextDecoder
from azu.errors import AzuError
from azu.jobs.redis import RedisJobs
from azu.lifecycle.ports import Ran
from azu.protocol.job import FinishReason, Job, TokenEvent
from azu.protocol.step import StepResult
from azu.protocol.structure import Structure
from azu.protocol.topology import Loss, Topology

log = logging.getLogger(__name__)

# A job that several sequences answer has ended as the one that says most did.
_WORST_LAST = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.ERROR)
_SEED_RANGE = 2**63


@dataclass(slots=True)
class _Running:
    """A job whose choices have not all ended."""

    job: Job
    ended: asyncio.Future[Ran]
    open: set[int] = field(default_factory=set)
    delivered: int = 0
    reason: FinishReason = FinishReason.STOP
    work: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


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
        self._epoch = topology.epoch
        self._engine = EnginePipeline(structure, topology, scheduling, eos_token_ids)
        meter = open_meter(lambda: self._pace.stand(self._engine))
        self._pace = Pace(structure.model_id, scheduling.num_blocks, meter)
        self._text = TextDecoder.from_json(text_decoder)
        self._jobs = RedisJobs.from_url(redis_url)
        self._step_timeout_s = step_timeout_s
        self._ids = itertools.count(1)
        self._running: dict[int, tuple[_Running, int]] = {}  # by sequence, with the choice that it is
        self._updates: asyncio.Queue[list[SequenceUpdate]] = asyncio.Queue()
        self._broken: AzuError | None = None
        self._stages: Ordered[ActorHandle] = ()
        self._losses: asyncio.Queue[tuple[Loss, int, bool]] = asyncio.Queue()
        self._is_paused = False
        self._watchers: set[asyncio.Task[None]] = set()

    async def start(self, stages: Ordered[ActorHandle]) -> None:
        """Learn the stages, in order, and begin to write tokens."""
        self._stages = stages
        self._writer = asyncio.create_task(self._write())

    async def run(self, job: Job) -> Ran:
        """Run a job to its end; its tokens are in Redis when this returns."""
        if self._broken is not None:
            return Ran(completion_tokens=0, finish_reason=FinishReason.ERROR, error=self._broken)
        running = _Running(job, asyncio.get_running_loop().create_future())
        for choice in range(job.choices):
            sequence = self._sequence(job, choice)
            self._engine.add(sequence)
            self._pace.began(sequence.sequence_id, len(job.prompt_token_ids), time.monotonic())
            self._running[sequence.sequence_id] = (running, choice)
            running.open.add(sequence.sequence_id)
        self._pump()
        return await running.ended

    async def cancel(self, job_id: str) -> None:
        """End a job's sequence within one step; what was delivered stays delivered."""
        for sequence_id, (running, _) in self._running.items():
            if running.job.job_id == job_id:
                self._updates.put_nowait(self._engine.cancel(sequence_id))
        self._pump()

    async def completed(self, result: StepResult) -> None:
        """Take the last stage's tokens."""
        updates = self._engine.complete(result)
        # The next step leaves before the tokens of this one are written down.
        self._pump()
        self._updates.put_nowait(updates)

    async def lost(self, loss: Loss, fault: str, epoch: int, bad_frame: bool = False) -> None:
        """Hear that pieces failed, are gone or sent a bad frame: nothing is scheduled until `resume`."""
        if epoch != self._epoch or self._is_paused:
            return  # whoever was running then is repaired already
        log.warning("%s: %s", loss, fault)
        self._engine.suspend()
        self._losses.put_nowait((loss, epoch, bad_frame))

    async def next_loss(self) -> tuple[Loss, int, bool]:
        """Wait for what the stages report as lost, from which epoch, and whether for a bad frame."""
        return await self._losses.get()

    async def pause(self) -> int:
        """Schedule nothing until `resume`, forget what is in flight; return how many steps were completed."""
        self._is_paused = True
        self._engine.suspend()
        return self._engine.num_completed

    async def resume(
        self, topology: Topology, stages: Ordered[ActorHandle], empty_stages: frozenset[int]
    ) -> None:
        """Go on under a newer topology: empty stages are filled, then every sequence goes on as it stood."""
        empty = empty_stages | self._engine.unfilled_stages
        cached = tuple(self._engine.num_cached)
        senders = sorted({stage - 1 for stage in empty if stage})
        num_sent = await asyncio.gather(*(self._num_sent(stages[sender], cached) for sender in senders))
        self._epoch = topology.epoch
        self._is_paused = False
        self._stages = stages
        self._engine.resume(topology, empty, dict(zip(senders, num_sent, strict=True)))
        self._pace.repaired()
        self._pump()

    async def fail(self, error: AzuError) -> None:
        """End everything that runs here with what it has."""
        self._broken = error
        self._pace.repaired(given_up=True)
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

    def _sequence(self, job: Job, choice: int) -> Sequence:
        # The first choice is what the job would get if it asked for one.
        sampling = replace(job.sampling, seed=(job.sampling.seed + choice) % _SEED_RANGE)
        text = self._text.completion(job.prompt_token_ids, sampling) if sampling.stop else None
        return Sequence(
            next(self._ids), job.prompt_token_ids, sampling, ends_with=text.ends_with if text else None
        )

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
            await self.lost(Loss(stages=frozenset({stage})), fault.message, epoch)

    async def _write(self) -> None:
        while True:
            updates = await self._updates.get()
            while not self._updates.empty():
                updates = updates + self._updates.get_nowait()
            self._pace.went_on(updates, time.monotonic())
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
                    )
                    events.append((running.job.job_id, event))
                    running.delivered += len(update.token_ids)
            if events:
                await self._jobs.append(events)
            for update in updates:
                if update.finish_reason is not None:
                    self._end(update)

    def _end(self, update: SequenceUpdate) -> None:
        running, _ = self._running.pop(update.sequence_id)
        assert update.finish_reason is not None
        running.open.remove(update.sequence_id)
        running.reason = max(running.reason, update.finish_reason, key=_WORST_LAST.index)
        for layer, by_node in update.work.items():
            running.work[layer].update(by_node)
        if running.open:
            return
        broken = self._broken if running.reason is FinishReason.CANCELLED else None
        running.ended.set_result(
            Ran(
                completion_tokens=running.delivered,
                finish_reason=FinishReason.ERROR if broken else running.reason,
                work={layer: dict(by_node) for layer, by_node in running.work.items()},
                error=broken,
            )
        )
