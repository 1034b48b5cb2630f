"""Pipeline: the loop of one deployed model. Token ids pass through here, hidden states never do."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

import ray
from ray.actor import ActorHandle

from actors.links import answer_from_piece, as_azu_error, raises_known_errors
from actors.placement import CONTROL
from actors.telemetry import log_as, open_supervisor
from azu.engine.canary import CanaryAnswer
from azu.engine.expert_counts import Received, ReportedStep, check_received
from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import SchedulerConfig
from azu.engine.stage_contract import BadFrame
from azu.engine.step_check import check_counts
from azu.engine.text import TextDecoder
from azu.engine.timing import PipelineMetrics, RoundTimes
from azu.errors import AzuError, DeadlineExceeded, FrameError
from azu.jobs.job_runner import JobRunner
from azu.jobs.redis import RedisJobs
from azu.protocol.job import ChoiceKey, Job, JobRun, PauseReport, PipelineLook
from azu.protocol.step import StepResult
from azu.protocol.structure import Structure
from azu.protocol.topology import LossReport, PieceSet, Topology
from azu.supervision import as_known_error

log = logging.getLogger(__name__)

# How often expert sets are asked what they got, and how long an answer may take.
_COMPARE_S = 0.5
_ANSWER_S = 5.0


@raises_known_errors
class Pipeline:
    """Wraps a JobRunner and its EnginePipeline: steps go to the first stage, losses to the scheduler."""

    def __init__(
        self,
        structure: Structure,
        topology: Topology,
        scheduling: SchedulerConfig,
        text_decoder: str,
        redis_url: str,
        step_timeout_s: float,
    ) -> None:
        log_as("pipeline", model_id=structure.model_id)
        self._epoch = topology.epoch
        text = TextDecoder.from_json(text_decoder)
        self._engine = EnginePipeline(structure, topology, scheduling, text.ends)
        self._supervisor = open_supervisor("pipeline", lambda: self._metrics.set_load(self._engine))
        meter = self._supervisor.meter
        self._metrics = PipelineMetrics(structure.model_id, scheduling.num_blocks, meter)
        self._round_times = RoundTimes()
        # Set while there may be another step to send.
        self._has_change = asyncio.Event()
        self._runner = JobRunner(
            self._engine,
            RedisJobs.from_url(redis_url),
            text,
            self._metrics,
            on_change=self._has_change.set,
            ask_expert_sets=self._ask_expert_sets,
        )
        self._step_timeout_s = step_timeout_s
        self._stages: Sequence[ActorHandle] = ()
        self._expert_sets: Mapping[int, ActorHandle] = {}
        self._comparing: set[asyncio.Task[None]] = set()
        self._losses: deque[LossReport] = deque()
        self._has_losses = asyncio.Event()
        self._is_paused = False
        self._has_loops = False
        self._watchers: set[asyncio.Task[None]] = set()

    async def start(self, stages: Sequence[ActorHandle], expert_sets: Mapping[int, ActorHandle]) -> None:
        """Learn the stages, in order, and the expert sets, and begin to write tokens."""
        self._stages, self._expert_sets = stages, expert_sets
        self._keep_loops()

    async def run(self, job: Job) -> JobRun:
        """Run a job to its end; its tokens are in Redis when this returns."""
        return await self._runner.run(job)

    async def jobs(self) -> frozenset[str]:
        """Return the jobs that have not ended here."""
        return self._runner.job_ids

    async def look(self) -> PipelineLook:
        """Return what the jobs here do."""
        return self._runner.look(self._round_times.usual_s)

    async def canary(self, timeout_s: float) -> CanaryAnswer:
        """Continue the canary's prompts behind all jobs; raises an AzuError without an answer in time."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._runner.canary()
        except TimeoutError as error:
            raise DeadlineExceeded(f"the canary was not through in {timeout_s:.0f} s") from error

    async def cancel(self, job_id: str) -> None:
        """End a job's sequences within one step; what was delivered stays delivered."""
        self._runner.cancel(job_id)

    async def end(self, job_id: str, error: AzuError) -> None:
        """End a job with what was delivered, and this error."""
        self._runner.end(job_id, error)

    async def completed(self, result: StepResult) -> None:
        """Take the last stage's tokens."""
        try:
            self._runner.complete(result)
        except BadFrame as error:
            sender = PieceSet(stages=frozenset({error.sender}))
            self._lose(sender, error.message, self._epoch, is_bad_frame=True)
        else:
            self._round_times.returned(result.step, time.monotonic())

    async def fail(self, error: AzuError) -> None:
        """End everything that runs here with what was delivered."""
        self._metrics.record_recovery(given_up=True)
        self._runner.fail(error)

    async def lost(self, pieces: PieceSet, fault: str, epoch: int, is_bad_frame: bool = False) -> None:
        """Take a report that pieces failed, are gone or sent a bad frame; no step is sent until `resume`.

        Without pieces the report says that a step was lost on its way.
        """
        self._lose(pieces, fault, epoch, is_bad_frame=is_bad_frame)

    def _lose(self, pieces: PieceSet, fault: str, epoch: int, *, is_bad_frame: bool = False) -> None:
        if epoch != self._epoch or self._is_paused:
            return  # what was lost then is repaired already
        log.warning("%s: %s", pieces, fault)
        self._engine.suspend()
        self._losses.append(LossReport(pieces, epoch, is_bad_frame))
        self._has_losses.set()

    async def next_loss(self, wait_s: float) -> LossReport | None:
        """Return the oldest report of a loss, None if there is none for `wait_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._has_losses.wait(), wait_s)
        if not self._losses:
            return None
        report = self._losses.popleft()
        if not self._losses:
            self._has_losses.clear()
        return report

    async def limit(self, num_blocks: int) -> int:
        """Admit no sequence that `num_blocks` would not hold alone; return how many are still needed."""
        return self._engine.limit(num_blocks)

    async def pause(self) -> PauseReport:
        """Send no step until `resume`, and forget what is in flight."""
        self._is_paused = True
        self._engine.suspend()
        return PauseReport(self._engine.num_completed, self._runner.under_way)

    async def resume(
        self,
        topology: Topology,
        stages: Sequence[ActorHandle],
        expert_sets: Mapping[int, ActorHandle],
        empty_stages: frozenset[int],
        alone: frozenset[ChoiceKey],
        is_repair: bool,
    ) -> None:
        """Go on under a newer topology: empty stages are filled, then every sequence goes on as it stood.

        Each of the choices `alone` shares no step with another until it comes further.
        """
        empty = (empty_stages | self._engine.unfilled_stages) & frozenset(range(len(stages)))
        cached = tuple(self._engine.num_cached)
        senders = sorted({stage - 1 for stage in empty if stage})
        num_sent = await asyncio.gather(*(self._num_sent(stages[sender], cached) for sender in senders))
        if topology.epoch <= self._epoch:
            return  # from a scheduler that died meanwhile
        self._compare_work()
        self._epoch = topology.epoch
        self._is_paused = False
        self._stages, self._expert_sets = stages, expert_sets
        self._engine.suspend()
        sent = dict(zip(senders, num_sent, strict=True))
        self._engine.resume(topology, empty, sent, self._runner.sequences_of(alone))
        if is_repair:
            self._metrics.record_recovery()
        self._keep_loops()
        self._has_change.set()

    async def _num_sent(self, stage: ActorHandle, sequence_ids: Sequence[int]) -> Mapping[int, int]:
        asking = stage.num_sent.options(concurrency_group=CONTROL).remote(sequence_ids)
        try:
            return check_counts(await asyncio.wait_for(asking, self._step_timeout_s))
        except Exception as error:
            # Without its rows everything is computed again; if the stage is gone, its watcher notices.
            log.warning("a stage did not answer what it can send again: %s", type(error).__name__)
            return {}

    def _keep_loops(self) -> None:
        # Also at a resume, if the start failed.
        if not self._has_loops:
            self._has_loops = True
            self._supervisor.start("tokens", self._runner.write)
            self._supervisor.start("steps", self._send_steps)
            self._supervisor.start("work", self._ask_expert_sets, every_s=_COMPARE_S)

    async def _send_steps(self) -> None:
        """Send the steps that can be sent now, once there may be one."""
        await self._has_change.wait()
        while self._runner.takes_tokens and (batch := self._engine.next_batch()) is not None:
            stages = self._stages
            if seen := self._engine.seen_by(batch):
                # A step must not come to the last stage before the tokens that it needs there.
                showing = stages[-1].see.options(concurrency_group=CONTROL).remote(seen)
                await self._watch(showing, stages[-1], len(stages) - 1, batch.epoch)
                if not self._engine.waits_for(batch):
                    continue
            stage = max(0, batch.replay.first - 1) if batch.replay else 0
            self._round_times.sent(batch.step, time.monotonic())
            sent = stages[stage].step.remote(batch, None)
            watcher = asyncio.create_task(self._watch(sent, stages[stage], stage, batch.epoch))
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)
        self._has_change.clear()

    async def _ask_expert_sets(self) -> None:
        """Compare what routers say with what the expert sets got, and wait until all is compared."""
        self._compare_work()
        if self._comparing:
            await asyncio.wait(self._comparing)

    def _compare_work(self) -> None:
        if reported := self._engine.take_reported():
            comparing = asyncio.create_task(self._compare(reported, self._epoch, self._expert_sets))
            self._comparing.add(comparing)
            comparing.add_done_callback(self._comparing.discard)

    async def _compare(
        self, reported: Sequence[ReportedStep], epoch: int, expert_sets: Mapping[int, ActorHandle]
    ) -> None:
        try:
            steps = [one.step for one in reported]
            asking = (self._received(index, piece, epoch, steps) for index, piece in expert_sets.items())
            answers = zip(expert_sets, await asyncio.gather(*asking), strict=True)
            received = {index: answer for index, answer in answers if answer is not None}
            for one, found in self._engine.compare(reported, received):
                log.warning("node %s, step %d, %s", one.nodes[found.holder][:8], one.step, found)
                self._metrics.record_difference(found)
        except Exception as error:
            as_known_error(error, "the comparison of expert work")

    async def _received(
        self, expert_set: int, piece: ActorHandle, epoch: int, steps: Sequence[int]
    ) -> Received | None:
        """Ask an expert set what it got in some steps; None without an answer."""
        asking = piece.received.options(concurrency_group=CONTROL).remote(epoch, steps)
        try:
            answer = await asyncio.wait_for(asking, _ANSWER_S)
            return None if answer is None else check_received(answer, steps)
        except FrameError as error:
            lost = PieceSet(expert_sets=frozenset({expert_set}))
            self._lose(lost, error.message, epoch, is_bad_frame=True)
        except Exception as error:
            log.warning("expert set %d does not say what it got: %s", expert_set, type(error).__name__)
        return None

    async def _watch(self, sent: ray.ObjectRef, piece: ActorHandle, stage: int, epoch: int) -> None:
        try:
            await answer_from_piece(sent, piece, self._step_timeout_s, f"stage {stage}")
        except Exception as error:
            fault = as_azu_error(error, f"stage {stage}")
            self._lose(PieceSet(stages=frozenset({stage})), fault.message, epoch)
