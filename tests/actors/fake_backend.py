"""A DeploymentBackend without a cluster: it knows which actor is up, loaded, linked and filled."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from azu.cluster.backend import Neighbours
from azu.engine.canary import CanaryAnswer
from azu.errors import AzuError, ModelNotFound, Unavailable, WorkerLost
from azu.models.status import ModelState, ModelStatus
from azu.planner.replicas import ExpertCounts
from azu.protocol.job import ChoiceKey, FinishReason, Job, JobRun, PauseReport, PipelineLook
from azu.protocol.node import Node
from azu.protocol.step import PieceProgress
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, LossReport, Piece, PieceSet, Stage, Topology, key_of, piece_set
from tests.builders import structure


@dataclass
class FakePiece:
    """The actor of a stage or an expert set; a stage that is loaded holds nothing until a resume fills it."""

    name: str
    piece: Piece
    epoch: int = 0
    is_loaded: bool = False
    is_filled: bool = False
    linked_epoch: int = 0
    neighbours: Neighbours | None = None
    died: asyncio.Event = field(default_factory=asyncio.Event)
    answers: asyncio.Queue[PieceProgress] = field(default_factory=asyncio.Queue)  # to pings


@dataclass
class FakePipeline:
    """A pipeline and the jobs that run in it until the test ends them."""

    name: str
    topology: Topology
    stages: Sequence[str] = ()
    is_running: bool = False
    is_paused: bool = False
    completed: int = 0
    blocks_in_use: int = 0
    under_way: dict[ChoiceKey, int] = field(default_factory=dict)
    losses: asyncio.Queue[LossReport] = field(default_factory=asyncio.Queue)
    jobs: dict[str, asyncio.Future[JobRun]] = field(default_factory=dict)
    fault: AzuError | None = None
    died: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class FakeBackend:
    """Every call is answered at once; a test disturbs it by `failing`, `deaf`, `on_fetch` and `on_load`."""

    nodes: dict[str, Node] = field(default_factory=dict)
    structures: dict[str, Structure] = field(default_factory=dict)  # by model id; four layers where not given
    unknown: str | None = None  # a model whose structure is not to be had
    failing: list[PieceSet] = field(default_factory=list)  # by load round: pieces that do not come up
    deaf: list[PieceSet] = field(default_factory=list)  # by link round: stages that do not take it
    long_steps: set[int] = field(default_factory=set)  # stages that take a link after `steps_end`
    steps_end: asyncio.Event = field(default_factory=asyncio.Event)
    on_fetch: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    on_load: list[Callable[[], Awaitable[None] | None]] = field(default_factory=list)
    pieces: dict[str, FakePiece] = field(default_factory=dict)
    pipelines: dict[str, FakePipeline] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    deployed: list[str] = field(default_factory=list)  # model ids, by pipelines started
    closed: list[str] = field(default_factory=list)  # model ids, by pipelines killed
    swept: list[frozenset[str]] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)
    marked: list[tuple[str, str, int, str]] = field(default_factory=list)
    probed: list[frozenset[str]] = field(default_factory=list)
    repairs: list[bool] = field(default_factory=list)  # what each resume was told
    alone: list[frozenset[ChoiceKey]] = field(default_factory=list)  # and this
    counts: ExpertCounts = field(default_factory=dict)
    # By model id; cut models where not given. None while the registry is away.
    statuses: dict[str, ModelStatus] | None = field(default_factory=dict)
    liars: set[str] = field(default_factory=set)  # nodes whose pieces change tokens
    clear: bool = True  # whether the model is in no doubt about tokens
    asked: list[frozenset[str]] = field(default_factory=list)  # the nodes of each placement with a canary

    # What the test does and asks

    @property
    def pipeline(self) -> FakePipeline:
        """The pipeline that was started last."""
        return list(self.pipelines.values())[-1]

    def stage(self, index: int) -> FakePiece:
        """Return the living actor of a stage."""
        return next(one for one in self.pieces.values() if key_of(one.piece) == (Stage, index))

    def expert_set(self, index: int) -> FakePiece:
        """Return the living actor of an expert set."""
        return next(one for one in self.pieces.values() if key_of(one.piece) == (ExpertSet, index))

    def report(self, pieces: PieceSet, *, is_bad_frame: bool = False) -> None:
        """Have the stages report pieces as lost, under the epoch that runs."""
        self.pipeline.losses.put_nowait(LossReport(pieces, self.pipeline.topology.epoch, is_bad_frame))

    def end_job(self, job_id: str) -> None:
        """End a job that runs."""
        for pipeline in self.pipelines.values():
            if job := pipeline.jobs.pop(job_id, None):
                job.set_result(JobRun(1, FinishReason.STOP))

    # The port

    async def structure(self, model_id: str, revision: str) -> Structure:
        if model_id == self.unknown:
            raise ModelNotFound(f"there is no {model_id} any more")
        await asyncio.sleep(0)
        return self.structures.get(model_id) or structure(4, model_id=model_id)

    async def status(self, model_id: str) -> ModelStatus:
        if self.statuses is None:
            raise Unavailable("the registry is not up")
        return self.statuses.get(model_id) or ModelStatus(model_id, "r1", ModelState.READY)

    async def sweep(self, kept: frozenset[str]) -> frozenset[str]:
        self.swept.append(kept)
        living = self.pieces.keys() | self.pipelines.keys()
        for name in living - kept:
            self.kill(name)
        return frozenset(living & kept)

    async def probe(self, node_ids: frozenset[str]) -> None:
        self.probed.append(node_ids)

    def blame(self, node_id: str) -> None:
        self.blamed.append(node_id)

    def mark(self, node_id: str, model_id: str, layer: int, owner: str) -> None:
        self.marked.append((node_id, model_id, layer, owner))

    async def start(self, name: str, piece: Piece) -> None:
        assert name not in self.pieces, "every actor has a name of its own"
        await asyncio.sleep(0)
        self.pieces[name] = FakePiece(name, piece)

    async def find(self, name: str) -> bool:
        return name in self.pieces or name in self.pipelines

    async def fetch(self, name: str, piece: Piece, structure: Structure) -> None:
        if self.on_fetch:
            await self.on_fetch.pop(0)()

    async def load(
        self, name: str, piece: Piece, structure: Structure, topology: Topology, to: Neighbours
    ) -> None:
        actor = self.pieces[name]
        if self.on_load:
            waiting = self.on_load.pop(0)()
            if waiting is not None:
                await waiting
        await asyncio.sleep(0)
        if self.failing and piece_set([key_of(piece)]) & self.failing[0]:
            self.failing[0] -= piece_set([key_of(piece)])
            if not self.failing[0]:
                self.failing.pop(0)
            raise WorkerLost(f"{name} died while it loaded")
        self.loaded.append(name)
        actor.is_loaded, actor.neighbours = True, to
        actor.epoch = actor.linked_epoch = topology.epoch

    async def link(self, name: str, topology: Topology, to: Neighbours) -> None:
        actor = self.pieces[name]
        if self.deaf and piece_set([key_of(actor.piece)]) & self.deaf[0]:
            self.deaf.pop(0)
            raise WorkerLost(f"{name} does not answer")
        if actor.piece.index in self.long_steps:
            self.long_steps.remove(actor.piece.index)
            await self.steps_end.wait()
        actor.linked_epoch, actor.neighbours = topology.epoch, to

    async def ping(self, name: str, piece: Piece) -> PieceProgress:
        actor = self.pieces[name]
        dying = asyncio.ensure_future(actor.died.wait())
        answering = asyncio.ensure_future(actor.answers.get())
        try:
            await asyncio.wait({dying, answering}, return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                raise WorkerLost(f"{name} is gone")
            return answering.result()
        finally:
            dying.cancel()
            answering.cancel()

    async def num_chosen(self, name: str) -> ExpertCounts:
        return self.counts if isinstance(self.pieces[name].piece, Stage) else {}

    def kill(self, name: str) -> None:
        self.killed.append(name)
        self.pieces.pop(name, None)
        if pipeline := self.pipelines.pop(name, None):
            self.closed.append(pipeline.topology.model_id)
            self._end(pipeline)

    async def start_pipeline(self, name: str, structure: Structure, topology: Topology) -> None:
        self.deployed.append(topology.model_id)
        self.pipelines[name] = FakePipeline(name, topology)

    async def begin(self, pipeline: str, stages: Sequence[str], expert_sets: Mapping[int, str]) -> None:
        found = self._living(pipeline)
        assert stages or found.is_paused, "a job that has come would be sent to no stage"
        found.stages, found.is_running = stages, bool(stages)
        for stage in stages:
            self.pieces[stage].is_filled = True

    async def run(self, pipeline: str, job: Job) -> JobRun:
        found = self._living(pipeline)
        found.jobs[job.job_id] = asyncio.get_running_loop().create_future()
        return await found.jobs[job.job_id]

    async def cancel(self, pipeline: str, job_id: str) -> None:
        self._living(pipeline).jobs.pop(job_id).set_result(JobRun(0, FinishReason.CANCELLED))

    async def end(self, pipeline: str, job_id: str, error: AzuError) -> None:
        self._living(pipeline).jobs.pop(job_id).set_result(JobRun(0, FinishReason.ERROR, error=error))

    async def look(self, pipeline: str) -> PipelineLook:
        found = self._living(pipeline)
        return PipelineLook(found.completed, 0.0, dict.fromkeys(found.jobs, found.completed))

    async def canary(self, pipeline: str) -> CanaryAnswer:
        nodes = self._living(pipeline).topology.vram_bytes_by_node.keys()
        self.asked.append(frozenset(nodes))
        tokens = 1 + len(self.liars & nodes) if self.clear else 0
        return CanaryAnswer(((7, 8, 9, 7, tokens),), ((5.0 if self.clear else 0.1,) * 5,))

    async def running_jobs(self, pipeline: str) -> frozenset[str]:
        return frozenset(self._living(pipeline).jobs)

    async def limit(self, pipeline: str, num_blocks: int) -> int:
        return max(num_blocks, self._living(pipeline).blocks_in_use)

    async def pause(self, pipeline: str) -> PauseReport:
        found = self._living(pipeline)
        found.is_running, found.is_paused = False, True
        return PauseReport(found.completed, dict(found.under_way))

    async def resume(
        self,
        pipeline: str,
        topology: Topology,
        stages: Sequence[str],
        expert_sets: Mapping[int, str],
        empty: frozenset[int],
        *,
        alone: frozenset[ChoiceKey],
        is_repair: bool,
    ) -> None:
        found = self._living(pipeline)
        self._check(found, topology, stages, empty)
        assert expert_sets.keys() == {one.index for one in topology.expert_sets}
        assert all(self.pieces[name].is_loaded for name in expert_sets.values())
        for index in empty:
            self.pieces[stages[index]].is_filled = True
        found.topology, found.stages, found.is_running = topology, stages, True
        self.repairs.append(is_repair)
        self.alone.append(alone)

    async def next_loss(self, pipeline: str) -> LossReport | None:
        found = self._living(pipeline)
        reading = asyncio.ensure_future(found.losses.get())
        dying = asyncio.ensure_future(found.died.wait())
        try:
            await asyncio.wait({reading, dying}, return_when=asyncio.FIRST_COMPLETED)
            if found.died.is_set():
                raise WorkerLost(f"{pipeline} is gone")
            return reading.result()
        finally:
            reading.cancel()
            dying.cancel()

    def fail(self, pipeline: str, error: AzuError) -> None:
        if found := self.pipelines.get(pipeline):
            found.fault = error
            for job in found.jobs.values():
                job.set_result(JobRun(0, FinishReason.ERROR, error=error))
            found.jobs.clear()

    def _living(self, pipeline: str) -> FakePipeline:
        found = self.pipelines.get(pipeline)
        if found is None or found.died.is_set():
            raise WorkerLost(f"{pipeline} is gone")
        return found

    def _end(self, pipeline: FakePipeline) -> None:
        pipeline.died.set()
        for job in pipeline.jobs.values():
            job.set_exception(WorkerLost(f"{pipeline.name} is gone"))
        pipeline.jobs.clear()

    def end_pipeline(self) -> None:
        """Have the pipeline's process die."""
        self._end(self.pipeline)

    def end_piece(self, actor: FakePiece) -> None:
        """Have the process of a piece die: it holds nothing any more."""
        actor.is_loaded = False
        actor.died.set()

    def _check(
        self, pipeline: FakePipeline, topology: Topology, stages: Sequence[str], empty: frozenset[int]
    ) -> None:
        """Check that a topology can run: each piece is up in its place, linked, and filled or empty."""
        actors: dict[str, FakePiece] = {}
        for index, name in enumerate(stages):
            actor = actors[name] = self.pieces[name]
            after = stages[index + 1] if index + 1 < len(stages) else None
            assert key_of(actor.piece) == (Stage, index), "the stages are given in order"
            assert actor.linked_epoch == topology.epoch, f"{name} has old neighbours"
            assert actor.is_filled or index in empty, f"{name} holds nothing"
            assert actor.neighbours is not None
            sets = actor.neighbours.expert_sets
            assert actor.neighbours == Neighbours(sets, after, pipeline.name)
            assert sets.keys() == {one.index for one in topology.expert_sets}
            actors |= {one: self.pieces[one] for one in sets.values()}
        wanted = {key_of(piece): piece.node_id for piece in topology.pieces}
        assert {key_of(one.piece): one.piece.node_id for one in actors.values()} == wanted, "as planned"
        assert all(one.is_loaded for one in actors.values())
