"""One deployed model, as a state machine: it keeps the actors that run equal to the topology that is wanted.

STARTING -> SERVING <-> RECONCILING -> BROKEN | CLOSED. What is wanted is a topology with its epoch and its
number of KV blocks; what there is are the actors of the pieces and one pipeline. Events: pieces are lost, a
node is lost, the pipeline is lost, the topology or the number of blocks is to change. Events collect until
the loop takes them all at once, so that losses which come during a round join the next one. A round is:
pause, fence, place, start and load, link, resume.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_random_exponential

from azu.cluster.backend import DeploymentBackend
from azu.cluster.current_pipeline import CurrentPipeline
from azu.cluster.deployment_store import DeploymentRecord, DeploymentStore
from azu.cluster.pieces import PieceActors
from azu.cluster.repairs import RepairTimes, RepairTurns, Suspects, Suspicion
from azu.errors import AzuError, HarmfulRequest, InsufficientCapacity, NumericsError, WorkerLost
from azu.planner.kv_blocks import with_blocks
from azu.planner.migration import TopologyChange
from azu.planner.plan import check_kv_capacity
from azu.planner.replicas import ExpertCounts
from azu.protocol.job import ChoiceKey, Job, JobRun, PauseReport, PipelineLook, Placement
from azu.protocol.phase import JobPhase
from azu.protocol.structure import Structure
from azu.protocol.topology import (
    LossReport,
    Piece,
    PieceKey,
    PieceSet,
    Topology,
    actor_name,
    key_of,
    keys_of,
    piece_set,
    room_of,
)
from azu.supervision import AWAY, as_known_error

log = logging.getLogger(__name__)

# Pieces that are lost this often without a completed step in between are not lost by accident.
_MOST_FRUITLESS = 5
_MOST_ROUNDS = 5
# The memory of a lost piece is reported as free one heartbeat later.
_FIRST_RETRY_S = 0.25
_LONGEST_RETRY_S = 1.0


class DeploymentState(StrEnum):
    """BROKEN and CLOSED are final: a broken deployment takes no new jobs, a closed one holds no memory."""

    STARTING = "starting"
    SERVING = "serving"
    RECONCILING = "reconciling"
    BROKEN = "broken"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class _WantedChange:
    """A change of the topology that waits for the loop; `done` says whether it was made."""

    change: TopologyChange
    done: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def can_begin(self, lost: PieceSet) -> bool:
        """Say whether nothing is lost and the caller still waits; a change gives way to a loss."""
        if lost:
            self.give_up()
        return not self.done.done()

    def give_up(self) -> None:
        """Report that the change was not made, unless it was."""
        if not self.done.done():
            self.done.set_result(False)

    def finish(self) -> None:
        """Report that the change was made, unless it was given up before."""
        if not self.done.done():
            self.done.set_result(True)


@dataclass(frozen=True, slots=True)
class _Round:
    """The pieces that hold nothing yet in the topology of a round, and those of them that are not up."""

    fresh: PieceSet
    missing: PieceSet


class Deployment:
    """A deployed model that reconciles itself until that is impossible.

    `place` finds places for lost pieces, `commit` makes a planned topology the current one; both call
    `set_topology` with a newer epoch. `place` raises InsufficientCapacity when no node has room; it is asked
    again for `room_wait_s`. `turns` are those of the model. `num_planned_blocks` is the KV that the policy
    asks for.
    """

    def __init__(
        self,
        backend: DeploymentBackend,
        store: DeploymentStore,
        structure: Structure,
        topology: Topology,
        *,
        place: Callable[["Deployment", PieceSet], Awaitable[None]],
        commit: Callable[["Deployment", Topology], Awaitable[None]],
        turns: RepairTurns,
        num_planned_blocks: int,
        room_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.structure = structure
        self.topology = topology
        self.state = DeploymentState.STARTING
        self._backend = backend
        self._store = store
        self._place = place
        self._commit = commit
        self._turns = turns
        self._suspects = Suspects()
        self._num_planned_blocks = num_planned_blocks
        self._room_wait_s = room_wait_s
        self._num_blocks = topology.num_blocks
        # The actors that there are.
        self._pieces = PieceActors(backend, structure, self._lose, clock)
        self.pipeline = CurrentPipeline(backend)
        # The events that the loop has not taken yet.
        self._event = asyncio.Event()
        self._lost = PieceSet()
        self._no_job_caused = PieceSet()  # those of them that are gone for another reason
        self._is_fault = False
        self._replacing = PieceSet()  # what the present repair starts
        # What moves, as it has room on other nodes, until it has its place.
        self._promised: dict[PieceKey, Piece] = {}
        self._wanted_change: _WantedChange | None = None
        self._last_completed = -1
        self._fruitless = 0
        self._supervisor: asyncio.Task[None] | None = None
        self._changing: asyncio.Task[bool] | None = None

    # Jobs

    @property
    def is_idle(self) -> bool:
        """Whether no job is expected here, and what an earlier scheduler left here is taken over."""
        return not self.pipeline.num_expected and self.state is not DeploymentState.STARTING

    @property
    def broken(self) -> bool:
        """Whether what was lost could not be replaced: the deployment takes no new jobs."""
        return self.state is DeploymentState.BROKEN

    @property
    def phase(self) -> JobPhase | None:
        """How far its start or its repair is; None while it serves."""
        if self.state is DeploymentState.SERVING:
            return None
        return self._pieces.phase(self.topology, is_repair=self.state is not DeploymentState.STARTING)

    def drop(self, job_id: str) -> bool:
        """Forget a job that is over; say whether it may still run here, and is to be cancelled."""
        self._suspects.forget(job_id)
        return self.pipeline.drop(job_id)

    async def run(self, job: Job) -> JobRun:
        """Run a job to its end; raises InvalidRequest when its KV would never fit.

        A pipeline that dies is replaced and the job goes on there. Raises WorkerLost once the deployment is
        broken.
        """
        num_tokens = len(job.prompt_token_ids) + job.sampling.max_tokens
        planned = replace(self.topology, num_blocks=self._num_planned_blocks)
        check_kv_capacity(self.structure, planned, num_tokens)
        run = await self.pipeline.run(job)
        if isinstance(run.error, NumericsError):
            self._backend.mark(run.error.node_id, job.model_id, run.error.layer, job.address)
        self._suspects.forget(job.job_id)
        return replace(run, placements=self.placements())

    async def look(self) -> PipelineLook | None:
        """Return what the pipeline and its jobs do, None while they are repaired or moved.

        Raises an AzuError when the pipeline does not answer.
        """
        if self.state is not DeploymentState.SERVING:
            return None
        look = await self._backend.look(self.pipeline.name)
        return replace(look, is_computing=self._pieces.is_computing)

    def restart_pipeline(self) -> None:
        """Have the pipeline replaced although it answers; its jobs go on in its successor."""
        self.pipeline.kill()
        self.pipeline_lost()

    def placements(self) -> tuple[Placement, ...]:
        """Return the receipt's lines: which node runs which layers and experts in which actor."""
        return self._pieces.placements()

    @property
    def pieces(self) -> PieceActors:
        """The actors of its pieces."""
        return self._pieces

    async def num_chosen(self) -> ExpertCounts:
        """Return how often each expert was chosen, in layers that have experts apart from their router.

        Raises an AzuError when a stage does not answer.
        """
        return await self._pieces.num_chosen()

    # Life

    async def start(self) -> None:
        """Start every actor of the topology; raises the first error of a piece that did not come up."""
        await self._start_pipeline()
        topology = self.topology
        errors = await self._pieces.bring_up(topology, topology.piece_set, self.pipeline.name)
        if errors:
            raise next(iter(errors.values()))
        await self._backend.begin(self.pipeline.name, self._pieces.stages, self._pieces.expert_sets)
        await self._save()
        self._supervise()

    async def adopt(self, record: DeploymentRecord) -> None:
        """Take over what another scheduler started; what is gone of it is started again.

        After an error this may be called again: nothing is repaired before all is found.
        """
        if await self._backend.find(record.pipeline):
            await self.pipeline.adopt(record.pipeline)
        else:
            log.warning("%s is gone", record.pipeline)
            self._is_fault = True
        self._lost |= await self._pieces.adopt(record.topology, record.pieces)
        self._event.set()
        self._supervise()

    async def close(self) -> None:
        """Kill every actor and give the VRAM back."""
        for task in (self._supervisor, self._changing):
            if task is not None:
                task.cancel()
        self.state = DeploymentState.CLOSED
        # At once, before anything is awaited: from now on its room is another's.
        self.pipeline.kill()
        self._pieces.close()
        await self._store.forget(self.topology)

    @property
    def resized(self) -> Topology:
        """The topology with the number of KV blocks that it is to have."""
        return with_blocks(self.structure, self.topology, self._num_blocks)

    def forgo_blocks(self) -> None:
        """Give up more KV blocks than there are now; to have fewer stays wanted."""
        self._num_blocks = min(self._num_blocks, self.topology.num_blocks)

    def set_topology(self, topology: Topology) -> None:
        """Make a topology the wanted one, with the number of KV blocks that the deployment is to have.

        What was promised is given back, except to what began to move meanwhile.
        """
        self.topology = with_blocks(self.structure, topology, self._num_blocks)
        waiting = keys_of(self._lost)
        self._promised = {key: piece for key, piece in self._promised.items() if key in waiting}

    def promised_bytes(self, pieces: PieceSet | None = None) -> dict[str, int]:
        """Return the room on nodes that is promised to some pieces, or to all of them."""
        keys = self._promised.keys() if pieces is None else keys_of(pieces)
        return room_of(piece for key, piece in self._promised.items() if key in keys)

    @property
    def being_replaced(self) -> PieceSet:
        """The pieces that are lost or given up, and have no successor yet that runs."""
        return self._lost | self._replacing

    # Events

    def pieces_lost(self, report: LossReport) -> None:
        """Take a report of the stages; pieces that were replaced since its epoch count no more.

        After a report without pieces the steps on their way are taken again.
        """
        if not report.lost:
            self.pipeline_lost()
        lost = self._pieces.not_replaced(report.lost, report.epoch)
        if report.is_bad_frame:
            self._no_job_caused |= lost
            for node_id in self._pieces.nodes_of(lost):
                self._backend.blame(node_id)
        self._lose(lost)

    def blame(self, node_id: str) -> None:
        """Replace what is on a node that computed values that are not finite, where another's are."""
        self._backend.blame(node_id)
        self.move_off(node_id, ())

    def move_off(self, node_id: str, promised: Iterable[Piece]) -> None:
        """Replace what is on a node, on others if one has room; `promised` has room there until then."""
        self._pieces.avoided.add(node_id)
        self._promised |= {key_of(piece): piece for piece in promised}
        self.node_lost(node_id)

    def node_lost(self, node_id: str) -> None:
        """Give up what is on a node that died or is being left; starts under way there fail at once."""
        self._no_job_caused |= self.topology.on_node(node_id)
        self._lose(self._pieces.node_lost(node_id))

    def pipeline_lost(self) -> None:
        """Have the pipeline replaced and everything linked to the new one."""
        self._is_fault = True
        self._event.set()

    async def resize(self, num_blocks: int) -> None:
        """Change the number of KV blocks, under a new epoch; blocks that are still needed are kept.

        More blocks come only if the nodes have the room when it is done.
        """
        # The pipeline may count on more blocks only once there are more.
        at_once = min(num_blocks, self.topology.num_blocks)
        self._num_blocks = max(num_blocks, await self._backend.limit(self.pipeline.name, at_once))
        self._event.set()

    async def change(self, change: TopologyChange, *, beside: bool) -> bool:
        """Change the topology; the fresh pieces are fetched before the old ones go, with `beside` loaded too.

        Returns False when it came to nothing: a piece was lost or did not come up, another change or a repair
        was under way, or the deployment was closed.
        """
        self._changing = asyncio.create_task(self._change(change, beside=beside))
        await asyncio.wait({self._changing})
        return not self._changing.cancelled() and self._changing.result()

    async def _change(self, change: TopologyChange, *, beside: bool) -> bool:
        before = self.topology
        try:
            planned = with_blocks(self.structure, change.topology, self._num_blocks)
            if beside:
                is_ready = await self._pieces.prepare(planned, change.fresh, self.pipeline.name)
            else:
                is_ready = await self._pieces.fetch(planned, change.fresh)
            if not is_ready:
                return False
            is_free = self.state is DeploymentState.SERVING and self._wanted_change is None
            if self.topology is not before or not is_free:
                return False
            self._wanted_change = wanted = _WantedChange(change)
            self._event.set()
            return await wanted.done
        finally:
            self._pieces.discard_prepared()

    def _lose(self, lost: PieceSet) -> None:
        self._lost |= lost
        if self._lost:
            self._event.set()

    # The loop

    def _supervise(self) -> None:
        self.state = DeploymentState.SERVING
        self._supervisor = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        """Reconcile until that is impossible: then the deployment is broken."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._reconcile_always())
                tasks.create_task(self._follow_pipeline())
        except* Exception as group:
            faults = (as_known_error(error, "the repair") for error in group.exceptions)
            fault = "; ".join(error.message for error in faults)
            log.error("%s is given up: %s", self.structure.model_id, fault, exc_info=True)
            self.state = DeploymentState.BROKEN
            self._promised = {}
            if self._changing is not None:
                self._changing.cancel()
            await self.pipeline.fail(WorkerLost(f"{self.structure.model_id} lost a worker: {fault}"))

    async def _reconcile_always(self) -> None:
        tried, failed = 0, 0
        while True:
            await self._event.wait()
            self.state = DeploymentState.RECONCILING
            change, self._wanted_change = self._wanted_change, None
            try:
                await self._reconcile(change)
            except (WorkerLost, InsufficientCapacity):
                raise  # there are no workers for it
            except Exception as error:
                tried += 1
                # The registry or Redis may be away for long: its jobs wait as long as they may.
                failed += not isinstance(error, AWAY)
                if failed == _MOST_FRUITLESS:
                    raise
                log.exception("the repair of %s failed, %d in a row", self.structure.model_id, tried)
                if change is not None:
                    change.give_up()
                # What is missing of the topology, or was started by the repair that failed, is started again.
                self._lost |= self._pieces.missing(self.topology) | self._replacing
                self.pipeline_lost()
                await self._turns.rest(tried)
            else:
                tried, failed = 0, 0
                self.state = DeploymentState.SERVING
                await self.pipeline.notify()

    async def _follow_pipeline(self) -> None:
        """Take the reports of the stages from the pipeline, and notice when the pipeline dies."""
        while True:
            try:
                if not self.pipeline.is_started:
                    raise WorkerLost(f"the pipeline of {self.structure.model_id} is gone")
                report = await self._backend.next_loss(self.pipeline.name)
                if report is not None:
                    self.pieces_lost(report)
            except Exception as error:
                # Repairs in vain are counted: it is not tried for ever.
                log.warning("%s", as_known_error(error, "a report of a pipeline").message)
                self.pipeline_lost()
                await self.pipeline.until(lambda: not self._event.is_set())

    async def _reconcile(self, change: _WantedChange | None) -> None:
        """Make everything run that the topology names; raises WorkerLost when that is impossible."""
        times = RepairTimes()
        paused = await self._pause()
        # Whatever the pipeline is paused for, the suspects share no step after it.
        suspicion = Suspicion(self._suspects.alone(paused.under_way))
        if not self._lost and not self._is_fault:
            await self._take_rounds(change, times, alone=suspicion.alone, is_repair=False)
            return
        if self._lost - self._no_job_caused:
            suspicion = self._suspects.lost(paused.under_way)
        await self._end_harmful(suspicion.guilty)
        self._count_fruitless(paused.num_completed, is_explained=bool(suspicion.guilty))
        async with self._turns.turn(self._fruitless):
            await self._take_rounds(change, times, alone=suspicion.alone, is_repair=True)

    async def _take_rounds(
        self,
        change: _WantedChange | None,
        times: RepairTimes,
        *,
        alone: frozenset[ChoiceKey],
        is_repair: bool,
    ) -> None:
        lost = self._take_losses()
        empty: frozenset[int] = frozenset()
        this = await self._switch(change) if change is not None and change.can_begin(lost) else None
        for tried in range(_MOST_ROUNDS):
            await self._turns.rest(tried - 1)
            self._replacing |= lost
            this = this or await self._replace(lost, times)
            self._replacing |= this.fresh
            empty |= this.fresh.stages
            failed = await self._pieces.bring_up(self.topology, this.missing, self.pipeline.name)
            times.passed("up")
            lost = (
                piece_set(failed)
                | await self._pieces.link(self.topology, self.pipeline.name)
                | self._take_losses()
            )
            times.passed("linked")
            is_repair |= bool(lost)
            if not lost and await self._resume(empty, alone=alone, is_repair=is_repair):
                times.passed("resumed")
                self._pieces.avoided.clear()
                log.warning("%s: %s", "repaired" if is_repair else "changed", times)
                self._replacing = PieceSet()
                if change is not None:
                    change.finish()
                return
            this = None
        raise WorkerLost(f"{lost} could not be brought up in {_MOST_ROUNDS} rounds")

    async def _end_harmful(self, guilty: frozenset[str]) -> None:
        for job_id in guilty:
            log.error("workers were lost again and again in steps of a job", extra={"job_id": job_id})
            error = HarmfulRequest(
                f"workers of {self.structure.model_id} were lost again and again while they computed this "
                "request; it is not tried any more"
            )
            try:
                await self.pipeline.end(job_id, error)
            except AzuError as fault:
                log.warning("%s: the job goes on in another pipeline", fault.message)

    async def _pause(self) -> PauseReport:
        """Pause the pipeline, or start another where it is gone or hangs."""
        if self.pipeline.is_started:
            try:
                return await self._backend.pause(self.pipeline.name)
            except AzuError as error:
                log.warning("%s", error.message)
                self.pipeline.kill()
        await self._start_pipeline()
        # Jobs may have come to it already: it must send no step before it has stages.
        paused = await self._backend.pause(self.pipeline.name)
        await self._backend.begin(self.pipeline.name, (), {})
        return paused

    async def _switch(self, wanted: _WantedChange) -> _Round:
        """Go over to a changed topology, with the pieces that were prepared for it."""
        change = wanted.change
        # From here on a loss counts by the indices of the new topology: no actor that goes reports any more.
        self._pieces.fence(change.gone)
        installed = self._pieces.install()
        await self._commit(self, change.topology)
        return _Round(change.fresh, missing=change.fresh - installed)

    async def _replace(self, lost: PieceSet, times: RepairTimes) -> _Round:
        """Find new places for what is lost, under a new epoch."""
        if lost:
            log.warning("lost %s", lost)
        self._pieces.fence(lost)
        times.passed("fenced")
        # A piece may have died with its whole node, whose silence was not noticed yet.
        await self._backend.probe(frozenset(self.topology.vram_bytes_of(lost)))
        retries = AsyncRetrying(
            retry=retry_if_exception_type(InsufficientCapacity),
            stop=stop_after_delay(self._room_wait_s),
            wait=wait_random_exponential(multiplier=_FIRST_RETRY_S, max=_LONGEST_RETRY_S),
            before_sleep=_log_retry,
            reraise=True,
        )
        await retries(self._place, self, lost)
        times.passed("placed")
        return _Round(fresh=lost, missing=lost)

    async def _resume(self, empty: frozenset[int], *, alone: frozenset[ChoiceKey], is_repair: bool) -> bool:
        pipeline, stages, expert_sets = self.pipeline.name, self._pieces.stages, self._pieces.expert_sets
        try:
            await self._backend.resume(
                pipeline, self.topology, stages, expert_sets, empty, alone=alone, is_repair=is_repair
            )
        except AzuError as error:
            log.warning("%s", error.message)
            # The next round links everything to the pipeline that is started here.
            await self._pause()
            return False
        await self._save()
        return True

    def _take_losses(self) -> PieceSet:
        lost, self._lost, self._is_fault = self._lost, PieceSet(), False
        self._no_job_caused = PieceSet()
        self._event.clear()
        return lost

    def _count_fruitless(self, completed: int, *, is_explained: bool) -> None:
        is_vain = completed == self._last_completed and not is_explained
        self._fruitless = self._fruitless + 1 if is_vain else 0
        self._last_completed = completed
        if self._fruitless >= _MOST_FRUITLESS:
            raise WorkerLost(f"{self._lost} was lost {_MOST_FRUITLESS} times without a step in between")

    # The pipeline and what is kept

    async def _start_pipeline(self) -> None:
        name = actor_name("pipeline", self.structure.model_id, self.topology.epoch)
        await self._backend.start_pipeline(name, self.structure, self.topology)
        await self.pipeline.replace(name)

    async def _save(self) -> None:
        """Keep the actors' names for the scheduler that comes after this one."""
        record = DeploymentRecord(self.topology, self._pieces.records(), self.pipeline.name)
        await self._store.keep(record)


def _log_retry(state: RetryCallState) -> None:
    assert state.outcome is not None
    log.warning("%s", state.outcome.exception())
