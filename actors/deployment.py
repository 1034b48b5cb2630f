"""One deployed model: its pieces and its pipeline, brought up, kept running and taken down together."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup

from actors.expert import ExpertActor
from actors.layer import LayerActor
from actors.links import REGISTRY, as_azu_error, ask, find
from actors.pipeline import Pipeline
from actors.placement import (
    CONTROL,
    actor_name,
    find_piece,
    release,
    reserve,
    start_in_group,
    start_on_head,
    sweep,
)
from azu.cluster.deployment import Commit, Repair, Replan
from azu.cluster.deployment_store import DeploymentRecord, StandingModels, StandingPiece
from azu.config import NetworkPolicy
from azu.engine.scheduler import SchedulerConfig
from azu.engine.stage_contract import StageSpec
from azu.errors import AzuError, DeadlineExceeded, WorkerLost
from azu.models.description import ModelDescription
from azu.planner.demand import shards_of
from azu.planner.kv_blocks import with_blocks
from azu.planner.migration import TopologyChange
from azu.planner.plan import check_kv_capacity
from azu.planner.replicas import ExpertCounts
from azu.protocol.job import Job, JobRun, Placement, placements
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, PieceKey, PieceSet, Stage, Topology, key_of, keys_of, loss_of


@dataclass(frozen=True, slots=True)
class Site:
    """Where models come up: the network's policy, its nodes and their agents by id, the pipelines' Redis.

    `blame` is called with the id of a node that sent a bad frame; `probe` has those of some nodes doubted
    that do not answer.
    """

    policy: NetworkPolicy
    redis_url: str
    agents: Mapping[str, ActorHandle]
    nodes: Mapping[str, Node]
    blame: Callable[[str], None]
    probe: Callable[[Iterable[str]], Awaitable[None]]


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Whom a stage calls: the sets that hold its experts, by index, the next stage, the pipeline."""

    expert_sets: Mapping[int, ActorHandle | None]
    after: ActorHandle | None
    pipeline: ActorHandle


class RayPiece:
    """A stage or expert set on its node.

    `epoch` is the one that it came up under, `linked_epoch` that of the neighbours which a stage knows.
    """

    def __init__(self, site: Site, structure: Structure, what: Stage | ExpertSet, epoch: int) -> None:
        self.what = what
        self.epoch = epoch
        self.linked_epoch = epoch
        kind = "layer" if isinstance(what, Stage) else "expert"
        self.name = actor_name(kind, structure.model_id, epoch, what.index)
        self.actor: ActorHandle | None = None
        self._site = site
        self._structure = structure
        self._group: PlacementGroup | None = None
        self._watch: asyncio.Task[None] | None = None
        self._coming_up: asyncio.Task[None] | None = None

    async def found(self, name: str) -> bool:
        """Take over what somebody else brought up under a name; False when it is gone."""
        self.name = name
        self.actor, self._group = await asyncio.to_thread(find_piece, name)
        if self.actor is None:
            release(None, self._group)
        return self.actor is not None

    async def start(self) -> None:
        """Reserve its VRAM and start its actor there."""
        cls = LayerActor if isinstance(self.what, Stage) else ExpertActor
        timeout_s = self._site.policy.timeouts.placement_s
        self._group = await reserve(self.name, self.what.node_id, self.what.vram_bytes, timeout_s)
        self.actor = start_in_group(cls, self.name, self._group)

    async def load(self, topology: Topology, neighbours: Neighbours) -> None:
        """Have its shards on the node and loaded; a stage learns whom it calls."""
        names = [shard.name for shard in shards_of(self._structure, self.what)]
        paths, config_folder = await self._fetch(names)
        if isinstance(self.what, Stage):
            loading = self._loading_stage(self.what, topology, neighbours, paths, config_folder)
        else:
            loading = self._loading_experts(self.what, paths, config_folder)
        await asyncio.wait_for(loading, self._site.policy.timeouts.load_s)

    async def relink(self, topology: Topology, neighbours: Neighbours) -> None:
        """Tell a stage whom it calls under a newer topology."""
        assert self.actor is not None
        relink = self.actor.relink.options(concurrency_group=CONTROL)
        answer = relink.remote(topology, neighbours.expert_sets, neighbours.after, neighbours.pipeline)
        await asyncio.wait_for(answer, self._site.policy.timeouts.step_s)
        self.linked_epoch = topology.epoch

    async def num_chosen(self) -> ExpertCounts:
        """Ask a stage how often each expert was chosen; raises an AzuError when it does not say."""
        assert self.actor is not None
        asking = self.actor.num_chosen.options(concurrency_group=CONTROL).remote()
        try:
            counts: ExpertCounts = await asyncio.wait_for(asking, self._site.policy.timeouts.step_s)
        except Exception as error:
            raise as_azu_error(error, self.name) from error
        return counts

    def watch(self, died: Callable[[], None]) -> None:
        """Say from now on when its process dies or does not answer any more."""
        self._watch = asyncio.create_task(self._look(died))

    def node_died(self) -> bool:
        """Hear that its node is dead: what is under way fails at once; False when nothing is."""
        return self._coming_up is not None and self._coming_up.cancel()

    async def attempt(self, step: Coroutine[Any, Any, None]) -> AzuError | None:
        """Take a step of its way up and return what went wrong; `node_died` ends it."""
        self._coming_up = asyncio.create_task(step)
        try:
            (result,) = await asyncio.gather(self._coming_up, return_exceptions=True)
        finally:
            self._coming_up = None
        if isinstance(result, asyncio.CancelledError):
            return WorkerLost(f"the node of {self.name} died")
        if isinstance(result, Exception):
            return as_azu_error(result, self.name)
        if isinstance(result, BaseException):
            raise result
        return None

    def take_down(self) -> None:
        """End it, whether it is dead or only seems so, and give its VRAM back."""
        if self._watch is not None:
            self._watch.cancel()
        release(self.actor, self._group)

    def _loading_stage(
        self, stage: Stage, topology: Topology, neighbours: Neighbours, paths: dict[str, Path], folder: Path
    ) -> Awaitable[None]:
        assert self.actor is not None
        spec = StageSpec(
            structure=self._structure, stage=stage, epoch=topology.epoch, num_blocks=topology.num_blocks,
            block_size=topology.block_size, shard_paths=paths, config_folder=folder,
            device=self._site.nodes[stage.node_id].device, expert_sets=topology.expert_sets,
        )  # fmt: skip
        ack_timeout_s = self._site.policy.timeouts.step_s
        loading: Awaitable[None] = self.actor.load.remote(
            spec, neighbours.expert_sets, neighbours.after, neighbours.pipeline, ack_timeout_s
        )
        return loading

    def _loading_experts(self, chosen: ExpertSet, paths: dict[str, Path], folder: Path) -> Awaitable[None]:
        assert self.actor is not None
        device = self._site.nodes[chosen.node_id].device
        loading: Awaitable[None] = self.actor.load.remote(
            self._structure, chosen.experts, paths, folder, device
        )
        return loading

    async def _fetch(self, names: Sequence[str]) -> tuple[dict[str, Path], Path]:
        agent = self._site.agents.get(self.what.node_id)
        if agent is None:
            raise WorkerLost(f"node {self.what.node_id[:8]} is gone")
        fetching = agent.fetch.remote(self._structure, names)
        fetched: tuple[dict[str, Path], Path] = await asyncio.wait_for(
            fetching, self._site.policy.timeouts.fetch_s
        )
        return fetched

    async def _look(self, died: Callable[[], None]) -> None:
        """Hear at once when its process dies, and after a while when it does not answer any more."""
        assert self.actor is not None
        heartbeat = self._site.policy.heartbeat
        alive = self.actor.alive.options(concurrency_group=CONTROL)
        try:
            while True:
                await asyncio.wait_for(
                    alive.remote(heartbeat.period_s), heartbeat.period_s + heartbeat.dead_s
                )
        except Exception as error:
            log.warning("%s", as_azu_error(error, self.name).message)
            died()


_PIPELINE_CONCURRENCY = 10_000
_LISTEN_S = 1.0


class PipelineSeat:
    """Starts a model's pipeline, and another one in its place when it dies.

    What a pipeline knows is in the jobs' token streams: its heir goes on from there.
    """

    def __init__(
        self, policy: NetworkPolicy, redis_url: str, structure: Structure, topology: Topology
    ) -> None:
        self._policy = policy
        self._redis_url = redis_url
        self._structure = structure
        self._topology = topology
        self._what = f"the pipeline of {structure.model_id}"
        self._change = asyncio.Condition()
        self._given_up: AzuError | None = None
        self.sitting: ActorHandle | None = None
        self.name = ""

    @property
    def actor(self) -> ActorHandle:
        """The pipeline that sits here; there is one after `start` and after `pause`."""
        assert self.sitting is not None, "nobody sits here"
        return self.sitting

    async def start(self) -> None:
        """Start a pipeline; it does nothing before `begin`."""
        registered = self._structure.model_id, self._structure.revision
        timeout_s = self._policy.timeouts.describe_s
        described: ModelDescription = await ask(REGISTRY, "describe", *registered, timeout_s=timeout_s)
        text_decoder: str = await ask(REGISTRY, "text_decoder", *registered, timeout_s=timeout_s)
        self.name = actor_name("pipeline", self._structure.model_id, self._topology.epoch)
        actor = start_on_head(
            Pipeline,
            self.name,
            self._structure,
            self._topology,
            SchedulerConfig(
                num_blocks=self._topology.num_blocks,
                block_size=self._topology.block_size,
                prefill_chunk_tokens=self._policy.engine.prefill_chunk_tokens,
                max_running=self._policy.engine.max_running,
            ),
            described.architecture.eos_token_ids,
            text_decoder,
            self._redis_url,
            self._policy.timeouts.step_s,
            max_concurrency=_PIPELINE_CONCURRENCY,
        )
        await self._seat(actor)

    async def begin(self, stages: Sequence[ActorHandle]) -> None:
        """Have the pipeline run steps through these stages."""
        await self._told(self.actor.start.remote(stages))

    async def adopt(self, name: str) -> None:
        """Take over a pipeline that somebody else started; one that is gone is replaced at the next pause."""
        self.name = name
        try:
            await self._seat(await asyncio.to_thread(find, name))
        except ValueError:
            log.warning("%s is gone", name)

    async def jobs(self) -> frozenset[str]:
        """Return the jobs that run here; nobody's when the pipeline is gone."""
        if self.sitting is None:
            return frozenset()
        try:
            jobs: frozenset[str] = await self._told(self.sitting.jobs.remote())
        except AzuError as error:
            log.warning("%s", error.message)
            return frozenset()
        return jobs

    async def run(self, job: Job) -> JobRun:
        """Run a job in whoever sits here; raises WorkerLost once the model is given up."""
        while True:
            sitting = self.sitting
            try:
                if sitting is not None:
                    run: JobRun = await sitting.run.remote(job)
                    return run
            except RayActorError:
                log.warning("%s died under %s", self._what, job.job_id)
            except Exception as error:
                raise as_azu_error(error, self._what) from error
            await self.another(sitting)

    async def another(self, than: ActorHandle | None) -> None:
        """Wait until somebody else sits here; raises WorkerLost once the model is given up."""
        async with self._change:
            await self._change.wait_for(lambda: self._given_up or self.sitting is not than)
        if self._given_up is not None:
            raise self._given_up

    async def cancel(self, job_id: str) -> None:
        """End a job's sequences; a pipeline that comes up later reads that its user gave it up."""
        try:
            if self.sitting is not None:
                await self.sitting.cancel.remote(job_id)
        except RayActorError:
            log.info("%s is gone: its heir will not run %s", self._what, job_id)

    async def limit(self, num_blocks: int) -> int:
        """Have no sequence taken that `num_blocks` would not hold; return how many are needed still."""
        return int(await self._told(self.actor.limit.remote(num_blocks)))

    async def pause(self) -> int:
        """Have the pipeline wait; one that is gone or hangs is replaced. Return its completed steps."""
        if self.sitting is not None:
            try:
                return int(await self._told(self.sitting.pause.remote()))
            except (WorkerLost, DeadlineExceeded) as error:
                log.warning("%s", error.message)
                ray.kill(self.sitting)
        await self.start()
        await self.begin(())
        return int(await self._told(self.actor.pause.remote()))

    async def resume(
        self,
        topology: Topology,
        stages: Sequence[ActorHandle],
        empty_stages: frozenset[int],
        *,
        is_repair: bool,
    ) -> None:
        """Have the pipeline fill the empty stages and go on."""
        self._topology = topology
        await self._told(self.actor.resume.remote(topology, stages, empty_stages, is_repair))

    async def next_loss(self) -> tuple[PieceSet, int, bool]:
        """Wait for what the stages report as lost, from which epoch, and whether for a bad frame.

        Raises an AzuError when the pipeline dies.
        """
        while True:
            if self.sitting is None:
                raise WorkerLost(f"{self._what} is gone")
            listening = self.sitting.next_loss.remote(_LISTEN_S)
            loss, epoch, bad_frame = await self._told(listening)
            if loss:
                return loss, epoch, bad_frame

    async def give_up(self, error: WorkerLost) -> None:
        """End everything that runs here with what it has."""
        self._given_up = error
        if self.sitting is not None:
            self.sitting.fail.remote(error)
        async with self._change:
            self._change.notify_all()

    def close(self) -> None:
        """Take the pipeline down."""
        if self.sitting is not None:
            ray.kill(self.sitting)

    async def _seat(self, actor: ActorHandle) -> None:
        self.sitting = actor
        async with self._change:
            self._change.notify_all()

    async def _told(self, asking: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(asking, self._policy.timeouts.step_s)
        except Exception as error:
            raise as_azu_error(error, self._what) from error


Step = Callable[[RayPiece], Coroutine[Any, Any, None]]


class RayPieces:
    """Brings pieces up and down, and says which are lost; one model's, behind one pipeline.

    `lost` is called with what dies after it came up, `resumed` with every topology that runs.
    """

    def __init__(
        self,
        site: Site,
        structure: Structure,
        seat: PipelineSeat,
        *,
        lost: Callable[[PieceSet], None],
        resumed: Callable[[Topology], Awaitable[None]],
    ) -> None:
        self._site = site
        self._structure = structure
        self._seat = seat
        self._lost = lost
        self._resumed = resumed
        self._pieces: dict[PieceKey, RayPiece] = {}
        self._beside: dict[PieceKey, RayPiece] = {}

    def placements(self) -> tuple[Placement, ...]:
        """Return the receipt's lines: which node runs what in which actor."""
        return placements(((piece.what, piece.name) for piece in self._pieces.values()), self._site.nodes)

    def standing(self) -> tuple[StandingPiece, ...]:
        """Return the pieces as they are written down."""
        return tuple(
            StandingPiece(kind is Stage, index, piece.epoch, piece.name)
            for (kind, index), piece in self._pieces.items()
        )

    async def adopt(self, topology: Topology, standing: Iterable[StandingPiece]) -> PieceSet:
        """Find pieces that somebody else brought up; return those that are gone."""
        whats = {key_of(what): what for what in topology.pieces}
        for one in standing:
            what = whats[Stage if one.is_stage else ExpertSet, one.index]
            piece = RayPiece(self._site, self._structure, what, one.epoch)
            if await piece.found(one.name):
                self._pieces[key_of(what)] = piece
                self._watch(key_of(what))
        return loss_of(whats.keys() - self._pieces.keys())

    async def pause(self) -> int:
        """Have the pipeline wait, whoever is the pipeline by then."""
        return await self._seat.pause()

    async def fence(self, loss: PieceSet) -> None:
        """Kill what is lost, whether it is dead or only seems so, and give its VRAM back."""
        for key in keys_of(loss):
            if piece := self._pieces.pop(key, None):
                piece.take_down()

    async def prepare(self, topology: Topology, fresh: PieceSet) -> bool:
        """Bring pieces up beside those that run, for `install`; say whether all came up."""
        self._beside = self._made(topology, fresh)
        errors = await self._up(self._beside, topology, self._pieces | self._beside)
        for key, error in errors.items():
            log.warning("%s was not prepared: %s", loss_of([key]), error.message)
        return not errors

    def install(self) -> PieceSet:
        """Take what was prepared as the model's; return which pieces these are."""
        installed, self._beside = self._beside, {}
        self._pieces |= installed
        for key in installed:
            self._watch(key)
        return loss_of(installed)

    def discard(self) -> None:
        """Take down what was prepared and not installed."""
        while self._beside:
            self._beside.popitem()[1].take_down()

    async def bring_up(self, topology: Topology, loss: PieceSet) -> PieceSet:
        """Bring lost pieces up; return those that it did not work for."""
        errors = await self.try_bring_up(topology, loss)
        for key, error in errors.items():
            log.warning("%s did not come up: %s", loss_of([key]), error.message)
        return loss_of(errors)

    async def try_bring_up(self, topology: Topology, loss: PieceSet) -> Mapping[PieceKey, AzuError]:
        """Bring pieces up where the topology has them; return what went wrong for which."""
        coming = self._made(topology, loss)
        self._pieces |= coming
        errors = await self._up(coming, topology, self._pieces)
        for key in coming.keys() - errors.keys():
            self._watch(key)
        return errors

    async def relink(self, topology: Topology) -> PieceSet:
        """Tell every stage its new neighbours that does not know them; return those that did not take it."""
        behind = {
            key: piece
            for key, piece in self._pieces.items()
            if isinstance(piece.what, Stage) and piece.linked_epoch < topology.epoch
        }
        return loss_of(
            await _each(behind, lambda piece: piece.relink(topology, self._neighbours(piece, self._pieces)))
        )

    async def resume(self, topology: Topology, empty_stages: frozenset[int], *, is_repair: bool) -> None:
        """Have the pipeline fill the empty stages and go on."""
        await self._seat.resume(topology, self.stages(), empty_stages, is_repair=is_repair)
        await self._resumed(topology)

    def stages(self) -> list[ActorHandle]:
        """Return the stages in order."""
        found = sorted((key[1], piece.actor) for key, piece in self._pieces.items() if key[0] is Stage)
        return [actor for _, actor in found]

    async def num_chosen(self) -> ExpertCounts:
        """Return how often each expert was chosen, in layers that have experts apart from their router."""
        stages = [piece for (kind, _), piece in self._pieces.items() if kind is Stage]
        answers = await asyncio.gather(*(piece.num_chosen() for piece in stages))
        return {layer: counts for answer in answers for layer, counts in answer.items()}

    def still_there(self, loss: PieceSet, epoch: int) -> PieceSet:
        """Return what of a loss in an epoch was not replaced since."""
        return loss_of(
            key
            for key in keys_of(loss)
            if (piece := self._pieces.get(key)) is not None and piece.epoch <= epoch
        )

    def nodes_of(self, loss: PieceSet) -> frozenset[str]:
        """Return the nodes that hold some pieces."""
        return frozenset(self._pieces[key].what.node_id for key in keys_of(loss) if key in self._pieces)

    def node_died(self, node_id: str) -> None:
        """Give up what is on a node, without waiting for its actors to say so."""
        for key, piece in self._pieces.items():
            if piece.what.node_id == node_id and not piece.node_died():
                self._lost(loss_of([key]))
        for piece in self._beside.values():
            if piece.what.node_id == node_id:
                piece.node_died()

    def take_down(self) -> None:
        """Take every piece down and give the VRAM back."""
        self.discard()
        while self._pieces:
            _, piece = self._pieces.popitem()
            piece.take_down()

    def _made(self, topology: Topology, loss: PieceSet) -> dict[PieceKey, RayPiece]:
        return {
            key_of(what): RayPiece(self._site, self._structure, what, topology.epoch)
            for what in topology.pieces
            if key_of(what) in keys_of(loss)
        }

    async def _up(
        self, coming: Mapping[PieceKey, RayPiece], topology: Topology, among: Mapping[PieceKey, RayPiece]
    ) -> dict[PieceKey, AzuError]:
        """Bring pieces up whose neighbours are `among` some; return what went wrong for which."""
        errors = await _each(coming, RayPiece.start)
        started = {key: piece for key, piece in coming.items() if key not in errors}
        return errors | await _each(
            started, lambda piece: piece.load(topology, self._neighbours(piece, among))
        )

    def _watch(self, key: PieceKey) -> None:
        self._pieces[key].watch(lambda: self._lost(loss_of([key])))

    def _neighbours(self, piece: RayPiece, among: Mapping[PieceKey, RayPiece]) -> Neighbours:
        expert_sets = {key[1]: one.actor for key, one in among.items() if key[0] is ExpertSet}
        after = among.get((Stage, piece.what.index + 1))
        return Neighbours(expert_sets, after.actor if after else None, self._seat.actor)


async def _each(pieces: Mapping[PieceKey, RayPiece], step: Step) -> dict[PieceKey, AzuError]:
    """Take a step with several pieces at once; return the errors of those it failed for."""
    errors = await asyncio.gather(*(piece.attempt(step(piece)) for piece in pieces.values()))
    return {key: error for key, error in zip(pieces, errors, strict=True) if error is not None}


class RayDeployment:
    """A running model as the fleet sees it; it repairs itself until a repair is impossible."""

    def __init__(
        self, site: Site, standing: StandingModels, structure: Structure, topology: Topology, replan: Replan
    ) -> None:
        self.structure = structure
        self.topology = topology
        self.broken = False
        self._site = site
        self._standing = standing
        self._replan = replan
        self._seat = PipelineSeat(site.policy, site.redis_url, structure, topology)
        self._pieces = RayPieces(site, structure, self._seat, lost=self._lost, resumed=self._write_down)
        heartbeat = site.policy.heartbeat
        # Room that a dead process held is reported free by the time its node would be dead itself.
        self._repair = Repair(self._pieces, self._move, patience_s=heartbeat.dead_s)
        self._num_blocks = topology.num_blocks
        self._payout_by_node: dict[str, str] = {}
        self._running: set[str] = set()
        self._held: frozenset[str] = frozenset()
        self._supervisor: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[bool] | None = None

    @property
    def running_jobs(self) -> int:
        """Jobs that are expected here and were not let go."""
        return len(self._running)

    def expect(self, job_id: str) -> None:
        """Hear that a job is going to run here."""
        self._running.add(job_id)

    def let_go(self, job_id: str) -> None:
        """Hear that nobody waits for a job here any more, whether it ran or not."""
        self._running.discard(job_id)

    def holds(self, job_id: str) -> bool:
        """Whether a job runs here, or did without coming to an end: nobody else may run it."""
        return job_id in self._running or job_id in self._held

    def placements(self) -> tuple[Placement, ...]:
        """Return the receipt's lines: which node runs which layers and experts in which actor."""
        return self._pieces.placements()

    async def start(self) -> None:
        """Bring every piece up; raises the first error of those that did not come up."""
        self._note_payouts()
        await self._seat.start()
        errors = await self._pieces.try_bring_up(self.topology, _everything(self.topology))
        for error in errors.values():
            raise error
        await self._seat.begin(self._pieces.stages())
        await self._write_down(self.topology)
        self._supervisor = asyncio.create_task(self._supervise())

    async def adopt(self, standing: DeploymentRecord) -> None:
        """Take over what somebody else brought up; what of it is gone is brought up again."""
        self._payout_by_node |= standing.payout_by_node
        await self._seat.adopt(standing.pipeline)
        self._held = await self._seat.jobs()
        self._lost(await self._pieces.adopt(standing.topology, standing.pieces))
        self._repair.again(is_fault=False)
        self._supervisor = asyncio.create_task(self._supervise())

    async def run(self, job: Job) -> JobRun:
        """Run a job in the model's pipeline; raises InvalidRequest when its KV would never fit."""
        planned = self._site.policy.plan_policy()
        num_tokens = len(job.prompt_token_ids) + job.sampling.max_tokens
        check_kv_capacity(self.structure, replace(self.topology, num_blocks=planned.num_blocks), num_tokens)
        self._held |= {job.job_id}
        run = await self._seat.run(job)
        self._held -= {job.job_id}
        return replace(run, payout_by_node=dict(self._payout_by_node), placements=self.placements())

    async def num_chosen(self) -> ExpertCounts:
        """Ask the stages how often each expert was chosen."""
        return await self._pieces.num_chosen()

    async def resize(self, num_blocks: int) -> None:
        """Have another number of KV blocks, under a new epoch; those that sequences need alone are kept."""
        self._num_blocks = await self._seat.limit(num_blocks)
        self._repair.again(is_fault=False)

    async def move(self, change: TopologyChange, commit: Commit, *, beside: bool) -> bool:
        """Go over to other places, brought up `beside` what runs if there is room for both.

        False when it came to nothing: a piece was lost or did not come up, or the model was closed.
        """
        self._moving = asyncio.create_task(self._go_over(change, commit, beside=beside))
        await asyncio.wait({self._moving})
        return not self._moving.cancelled() and self._moving.result()

    async def cancel(self, job_id: str) -> None:
        """End a job's sequence."""
        await self._seat.cancel(job_id)

    def node_died(self, node_id: str) -> None:
        """Hear that a node is dead: what it held is lost."""
        self._pieces.node_died(node_id)

    async def close(self) -> None:
        """Take every piece down and give the VRAM back."""
        await self._standing.forget(self.topology)
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._moving is not None:
            self._moving.cancel()
        self._seat.close()
        self._pieces.take_down()

    async def _supervise(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._repair.run())
                tasks.create_task(self._hear_pipeline())
        except* AzuError as group:
            fault = "; ".join(str(error) for error in group.exceptions)
            log.error("%s is given up: %s", self.structure.model_id, fault)
            self.broken = True
            if self._moving is not None:
                self._moving.cancel()
            await self._seat.give_up(WorkerLost(f"{self.structure.model_id} lost a worker: {fault}"))

    async def _hear_pipeline(self) -> None:
        while True:
            sitting = self._seat.sitting
            try:
                loss, epoch, bad_frame = await self._seat.next_loss()
            except AzuError as error:
                log.warning("%s", error.message)
                self._repair.again(is_fault=True)
                await self._seat.another(than=sitting)
                continue
            lost = self._pieces.still_there(loss, epoch)
            if bad_frame:
                for node_id in self._pieces.nodes_of(lost):
                    self._site.blame(node_id)
            self._lost(lost)

    def _lost(self, loss: PieceSet) -> None:
        self._repair.lost(loss)

    async def _move(self, loss: PieceSet) -> Topology:
        # What died may have died with its whole node, which nobody has missed yet.
        await self._site.probe(self.topology.vram_bytes_of(loss))
        return self._take(await self._replan(loss))

    async def _go_over(self, change: TopologyChange, commit: Commit, *, beside: bool) -> bool:
        now = self.topology

        async def switch() -> Topology:
            return self._take(await commit())

        try:
            planned = with_blocks(self.structure, change.topology, self._num_blocks)
            if beside and not await self._pieces.prepare(planned, change.fresh):
                return False
            return self.topology is now and await self._repair.move(change, switch)
        finally:
            self._pieces.discard()

    def _take(self, topology: Topology) -> Topology:
        self.topology = with_blocks(self.structure, topology, self._num_blocks)
        self._note_payouts()
        return self.topology

    def _note_payouts(self) -> None:
        nodes = self._site.nodes
        # Whoever is not heard of any more was noted when it ran something.
        self._payout_by_node |= {
            node_id: nodes[node_id].payout_address
            for node_id in self.topology.vram_bytes_by_node
            if node_id in nodes
        }

    async def _write_down(self, topology: Topology) -> None:
        """Keep what stands where for whoever schedules next."""
        pieces = self._pieces.standing()
        await self._standing.keep(DeploymentRecord(topology, pieces, self._seat.name, self._payout_by_node))


class RayBuilder:
    """Brings models up on a site, and writes down which stand."""

    def __init__(self, site: Site, standing: StandingModels) -> None:
        self._site = site
        self._standing = standing

    async def structure(self, model_id: str, revision: str) -> Structure:
        """Return the model's structure, cutting it first when nobody has."""
        timeout_s = self._site.policy.timeouts.fetch_s
        structure: Structure = await ask(REGISTRY, "ensure_cut", model_id, revision, timeout_s=timeout_s)
        return structure

    async def build(self, structure: Structure, topology: Topology, replan: Replan) -> RayDeployment:
        """Bring up every piece; what was half up is taken down when it fails."""
        deployment = RayDeployment(self._site, self._standing, structure, topology, replan)
        try:
            await deployment.start()
        except BaseException as error:
            await deployment.close()
            if isinstance(error, Exception):
                raise as_azu_error(error, f"bringing up {topology.model_id}") from error
            raise
        return deployment

    async def adopt(self, structure: Structure, standing: DeploymentRecord, replan: Replan) -> RayDeployment:
        """Take over a model that stands."""
        deployment = RayDeployment(self._site, self._standing, structure, standing.topology, replan)
        await deployment.adopt(standing)
        return deployment

    async def sweep(self, kept: frozenset[str]) -> frozenset[str]:
        """Take down every piece and pipeline but those of these names; return which of these live."""
        return await asyncio.to_thread(sweep, kept)


def _everything(topology: Topology) -> PieceSet:
    return PieceSet(
        frozenset(stage.index for stage in topology.stages),
        frozenset(chosen.index for chosen in topology.expert_sets),
    )
