"""RayBackend: the actors of deployments as Ray's, each known by its name."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from tenacity import AsyncRetrying, RetryError, stop_after_delay, wait_fixed

from actors.expert import ExpertActor
from actors.layer import LayerActor
from actors.links import REGISTRY, as_azu_error, ask
from actors.node import NodeAgents
from actors.pipeline import Pipeline
from actors.placement import (
    CONTROL,
    find_piece,
    granted,
    release,
    reserve,
    start_in_group,
    start_on_head,
    sweep,
)
from azu.cluster.backend import Neighbours
from azu.config import NetworkPolicy
from azu.engine.canary import CanaryAnswer
from azu.engine.scheduler import SchedulerConfig
from azu.engine.stage_contract import StageSpec
from azu.engine.step_check import check_chosen, check_progress
from azu.errors import AzuError, DeadlineExceeded, InsufficientCapacity, WorkerLost
from azu.models.status import ModelStatus
from azu.planner.demand import shards_of
from azu.planner.replicas import ExpertCounts
from azu.protocol.job import ChoiceKey, Job, JobRun, PauseReport, PipelineLook
from azu.protocol.node import Node
from azu.protocol.step import PieceProgress
from azu.protocol.structure import Structure
from azu.protocol.topology import LossReport, Piece, Stage, Topology
from azu.supervision import as_known_error
from azu.units import format_bytes

log = logging.getLogger(__name__)

_PIPELINE_CONCURRENCY = 10_000
_LISTEN_S = 1.0
_STATUS_S = 1.0
_CUT_LOOK_S = 0.25
# The canary's few steps come after those of all jobs.
_CANARY_S = 600.0
# Ray's control service may start again meanwhile. What is left then is ended by the next scheduler.
_RELEASE_FOR_S = 600.0
_RELEASE_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class _Actor:
    """An actor and, for a piece, the placement group that holds its VRAM."""

    handle: ActorHandle
    group: PlacementGroup | None = None


class RayBackend:
    """A DeploymentBackend, whose methods say what each of these does.

    Pieces run on the nodes that have an agent, pipelines on the head, against `redis_url`. `blamed` is called
    with the id of a node that sent a bad frame, `marked` with the arguments of `mark`.
    """

    def __init__(
        self,
        policy: NetworkPolicy,
        redis_url: str,
        agents: NodeAgents,
        blamed: Callable[[str], None],
        marked: Callable[[str, str, int, str], None],
    ) -> None:
        self.nodes: Mapping[str, Node] = agents.nodes
        self._policy = policy
        self._timeouts = policy.timeouts
        self._redis_url = redis_url
        self._agents = agents
        self._blamed = blamed
        self._marked = marked
        self._actors: dict[str, _Actor] = {}
        self._releasing: set[asyncio.Task[None]] = set()

    async def structure(self, model_id: str, revision: str) -> Structure:
        describe_s = self._timeouts.describe_s
        try:
            async with asyncio.timeout(self._timeouts.fetch_s):
                while True:
                    cut = await ask(REGISTRY, "ensure_cut", model_id, revision, timeout_s=describe_s)
                    if cut is not None:
                        return cast(Structure, cut)
                    await asyncio.sleep(_CUT_LOOK_S)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{model_id} was not fetched and cut in time") from error

    async def status(self, model_id: str) -> ModelStatus:
        # It is asked while jobs wait to be told: a registry that is away is not waited for.
        return cast(ModelStatus, await ask(REGISTRY, "status", model_id, timeout_s=_STATUS_S, back_in_s=0.0))

    async def sweep(self, kept: frozenset[str]) -> frozenset[str]:
        return await asyncio.to_thread(sweep, kept)

    async def probe(self, node_ids: frozenset[str]) -> None:
        await self._agents.probe(node_ids)

    def blame(self, node_id: str) -> None:
        self._blamed(node_id)

    def mark(self, node_id: str, model_id: str, layer: int, owner: str) -> None:
        self._marked(node_id, model_id, layer, owner)

    # Pieces

    async def start(self, name: str, piece: Piece) -> None:
        cls = LayerActor if isinstance(piece, Stage) else ExpertActor
        timeout_s = self._timeouts.placement_s
        group: PlacementGroup | None = None
        try:
            group = reserve(name, piece.node_id, piece.vram_bytes)
            if not await granted(group, timeout_s):
                room = f"{format_bytes(piece.vram_bytes)} of VRAM"
                raise InsufficientCapacity(
                    f"node {piece.node_id[:8]} did not give {room} in {timeout_s:.0f} s"
                )
            self._actors[name] = _Actor(start_in_group(cls, name, group), group)
        except BaseException as error:
            self._release(name, None, group)
            if isinstance(error, Exception):
                raise as_azu_error(error, name) from error
            raise

    async def find(self, name: str) -> bool:
        handle, group = await asyncio.to_thread(find_piece, name)
        if handle is None:
            self._release(name, None, group)
            return False
        self._actors[name] = _Actor(handle, group)
        return True

    async def fetch(self, name: str, piece: Piece, structure: Structure) -> None:
        await self._fetch(name, piece, structure)

    async def load(
        self, name: str, piece: Piece, structure: Structure, topology: Topology, to: Neighbours
    ) -> None:
        actor = self._handle(name)
        paths, config_folder = await self._fetch(name, piece, structure)
        device = self.nodes[piece.node_id].device
        if isinstance(piece, Stage):
            spec = StageSpec(
                structure=structure, stage=piece, topology=topology, shard_paths=paths,
                config_folder=config_folder, device=device,
            )  # fmt: skip
            loading = actor.load.remote(spec, *self._handles(to), self._timeouts.step_s)
        else:
            loading = actor.load.remote(structure, piece.experts, paths, config_folder, device)
        await self._answer(loading, name, self._timeouts.load_s)

    async def link(self, name: str, topology: Topology, to: Neighbours) -> None:
        relink = self._handle(name).relink.options(concurrency_group=CONTROL)
        try:
            # It answers after the step that runs; the caller notices meanwhile when it dies or hangs.
            await relink.remote(topology, *self._handles(to))
        except Exception as error:
            raise as_azu_error(error, name) from error

    async def ping(self, name: str, piece: Piece) -> PieceProgress:
        ping = self._handle(name).ping.options(concurrency_group=CONTROL)
        try:
            # The call returns after a period; it fails at once when the process dies.
            progress = check_progress(await ping.remote(self._policy.heartbeat.period_s))
        except Exception as error:
            raise as_azu_error(error, name) from error
        self._agents.heard(piece.node_id)
        return progress

    async def num_chosen(self, name: str) -> ExpertCounts:
        asking = self._handle(name).num_chosen.options(concurrency_group=CONTROL).remote()
        return check_chosen(await self._answer(asking, name))

    def kill(self, name: str) -> None:
        if (actor := self._actors.pop(name, None)) is not None:
            self._release(name, actor.handle, actor.group)

    def _release(self, name: str, handle: ActorHandle | None, group: PlacementGroup | None) -> None:
        """Release a piece or a pipeline; what Ray does not take is tried again, and hinders no other."""
        try:
            release(handle, group)
        except Exception as error:
            as_known_error(error, f"the end of {name}")
            releasing = asyncio.create_task(_release_later(name, handle, group))
            self._releasing.add(releasing)
            releasing.add_done_callback(self._releasing.discard)

    # Pipelines

    async def start_pipeline(self, name: str, structure: Structure, topology: Topology) -> None:
        model = structure.model_id, structure.revision
        timeout_s = self._timeouts.describe_s
        text_decoder: str = await ask(REGISTRY, "text_decoder", *model, timeout_s=timeout_s)
        scheduling = SchedulerConfig(
            num_blocks=topology.num_blocks,
            block_size=topology.block_size,
            prefill_chunk_tokens=self._policy.engine.prefill_chunk_tokens,
            max_running=self._policy.engine.max_running,
        )
        try:
            handle = start_on_head(
                Pipeline, name, structure, topology, scheduling, text_decoder, self._redis_url,
                self._timeouts.step_s, max_concurrency=_PIPELINE_CONCURRENCY,
            )  # fmt: skip
        except Exception as error:
            raise as_azu_error(error, name) from error
        self._actors[name] = _Actor(handle)

    async def begin(self, pipeline: str, stages: Sequence[str], expert_sets: Mapping[int, str]) -> None:
        await self._call(pipeline, "start", *self._steps_through(stages, expert_sets))

    async def run(self, pipeline: str, job: Job) -> JobRun:
        try:
            run: JobRun = await self._handle(pipeline).run.remote(job)
        except Exception as error:
            raise as_azu_error(error, pipeline) from error
        return run

    async def cancel(self, pipeline: str, job_id: str) -> None:
        await self._call(pipeline, "cancel", job_id)

    async def look(self, pipeline: str) -> PipelineLook:
        look: PipelineLook = await self._call(pipeline, "look")
        return look

    async def canary(self, pipeline: str) -> CanaryAnswer:
        asking = self._handle(pipeline).canary.remote(_CANARY_S)
        answer: CanaryAnswer = await self._answer(asking, pipeline, _CANARY_S + self._timeouts.step_s)
        return answer

    async def running_jobs(self, pipeline: str) -> frozenset[str]:
        jobs: frozenset[str] = await self._call(pipeline, "jobs")
        return jobs

    async def limit(self, pipeline: str, num_blocks: int) -> int:
        return int(await self._call(pipeline, "limit", num_blocks))

    async def end(self, pipeline: str, job_id: str, error: AzuError) -> None:
        await self._call(pipeline, "end", job_id, error)

    async def pause(self, pipeline: str) -> PauseReport:
        report: PauseReport = await self._call(pipeline, "pause")
        return report

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
        handles = self._steps_through(stages, expert_sets)
        await self._call(pipeline, "resume", topology, *handles, empty, alone, is_repair)

    async def next_loss(self, pipeline: str) -> LossReport | None:
        report: LossReport | None = await self._call(pipeline, "next_loss", _LISTEN_S)
        return report

    def fail(self, pipeline: str, error: AzuError) -> None:
        if (actor := self._actors.get(pipeline)) is not None:
            actor.handle.fail.remote(error)

    def _handle(self, name: str) -> ActorHandle:
        actor = self._actors.get(name)
        if actor is None:
            raise WorkerLost(f"{name} is gone")
        return actor.handle

    def _steps_through(
        self, stages: Sequence[str], expert_sets: Mapping[int, str]
    ) -> tuple[list[ActorHandle], dict[int, ActorHandle]]:
        named = {index: self._handle(name) for index, name in expert_sets.items()}
        return [self._handle(stage) for stage in stages], named

    def _handles(
        self, to: Neighbours
    ) -> tuple[dict[int, ActorHandle | None], ActorHandle | None, ActorHandle]:
        """Return a stage's neighbours as its actor takes them; None stands for one that did not start."""
        sets = {index: self._actors.get(name) for index, name in to.expert_sets.items()}
        after = self._actors.get(to.next_stage or "")
        expert_sets = {index: actor.handle if actor else None for index, actor in sets.items()}
        return expert_sets, after.handle if after else None, self._handle(to.pipeline)

    async def _call(self, pipeline: str, method: str, *arguments: Any) -> Any:
        return await self._answer(getattr(self._handle(pipeline), method).remote(*arguments), pipeline)

    async def _answer(self, asking: Awaitable[Any], name: str, timeout_s: float | None = None) -> Any:
        """Wait for an actor's answer, by default for a step's time; raises AzuErrors only."""
        try:
            return await asyncio.wait_for(asking, timeout_s or self._timeouts.step_s)
        except Exception as error:
            raise as_azu_error(error, name) from error

    async def _fetch(self, name: str, piece: Piece, structure: Structure) -> tuple[dict[str, Path], Path]:
        """Return the paths of a piece's shards on its node, and of the folder with its config."""
        agent = self._agents.by_node.get(piece.node_id)
        if agent is None:
            raise WorkerLost(f"node {piece.node_id[:8]} is gone")
        names = [shard.name for shard in shards_of(structure, piece)]
        fetched: tuple[dict[str, Path], Path] = await self._answer(
            agent.fetch.remote(structure, names), name, self._timeouts.fetch_s
        )
        return fetched


async def _release_later(name: str, handle: ActorHandle | None, group: PlacementGroup | None) -> None:
    """Try again to release what Ray did not take."""
    retries = AsyncRetrying(stop=stop_after_delay(_RELEASE_FOR_S), wait=wait_fixed(_RELEASE_EVERY_S))
    try:
        await asyncio.sleep(_RELEASE_EVERY_S)
        await retries(asyncio.to_thread, release, handle, group)
    except RetryError:
        log.exception("%s was not ended in %.0f s", name, _RELEASE_FOR_S)
