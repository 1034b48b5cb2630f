"""One deployed model: its placement groups, actors and pipeline, brought up and taken down together."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup

from actors.expert import ExpertActor
from actors.layer import LayerActor
from actors.link import as_azu_error
from actors.pipeline import Pipeline
from actors.placement import actor_name, release, reserve, start_in_group, start_on_head
from azu.config import ControlConfig
from azu.engine.scheduler import SchedulerConfig
from azu.engine.spec import StageSpec
from azu.lifecycle.ports import Ran, Route
from azu.planner.admission import refuse_what_never_fits
from azu.protocol.job import Job, Placement
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Stage, Topology
from azu.registry.description import ModelDescription

_PIPELINE_CONCURRENCY = 10_000


@dataclass(slots=True)
class _Piece:
    """A stage or expert set on its node."""

    what: Stage | ExpertSet
    group: PlacementGroup
    actor: ActorHandle | None = None


@dataclass(slots=True)
class RayDeployment:
    """A running model as the fleet sees it."""

    structure: Structure
    topology: Topology
    route: Route
    _pieces: list[_Piece]
    _pipeline: ActorHandle
    broken: bool = False
    _running: set[str] = field(default_factory=set)

    @property
    def running_jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._running)

    async def run(self, job: Job) -> Ran:
        """Run a job in the model's pipeline; raises InvalidRequest when its KV would never fit."""
        refuse_what_never_fits(
            self.structure, self.topology, len(job.prompt_token_ids) + job.sampling.max_tokens
        )
        self._running.add(job.job_id)
        try:
            ran: Ran = await self._pipeline.run.remote(job)
        except Exception as error:
            self.broken = self.broken or isinstance(error, RayActorError)
            raise as_azu_error(error, f"the pipeline of {job.model_id}") from error
        finally:
            self._running.discard(job.job_id)
        self.broken = self.broken or ran.error is not None
        return ran

    async def cancel(self, job_id: str) -> None:
        """End a job's sequence."""
        await self._pipeline.cancel.remote(job_id)

    async def close(self) -> None:
        """Take every piece down and give the VRAM back."""
        _take_down(self._pieces, self._pipeline)


class RayBuilder:
    """Brings topologies up: VRAM reserved, shards fetched, actors started and linked, in that order."""

    def __init__(
        self, config: ControlConfig, registry: ActorHandle, agents: Mapping[str, ActorHandle],
        nodes: Mapping[str, Node],
    ) -> None:  # fmt: skip
        self._config = config
        self._registry = registry
        self._agents = agents
        self._nodes = nodes

    async def structure(self, model_id: str, revision: str) -> Structure:
        """Return the model's structure, cutting it first when nobody has."""
        try:
            structure: Structure = await self._registry.ensure_cut.remote(model_id, revision)
        except Exception as error:
            raise as_azu_error(error, "the registry") from error
        return structure

    async def build(self, structure: Structure, topology: Topology) -> RayDeployment:
        """Bring up every piece; what was half up is taken down when it fails."""
        pieces: list[_Piece] = []
        pipeline: ActorHandle | None = None
        try:
            await self._reserve(topology, pieces)
            pipeline = await self._start_pipeline(structure, topology)
            self._start_pieces(topology, pieces)
            await self._load(structure, topology, pieces, pipeline)
            await pipeline.start.remote(pieces[0].actor)
        except BaseException as error:
            _take_down(pieces, pipeline)
            if isinstance(error, Exception):
                raise as_azu_error(error, f"bringing up {topology.model_id}") from error
            raise
        return RayDeployment(structure, topology, self._route(topology), pieces, pipeline)

    async def _reserve(self, topology: Topology, pieces: list[_Piece]) -> None:
        timeout_s = self._config.policy.timeouts.placement_s
        whats: Sequence[Stage | ExpertSet] = (*topology.stages, *topology.expert_sets)
        reserving = [
            reserve(_name(topology, what), what.node_id, what.vram_bytes, timeout_s) for what in whats
        ]
        failed: list[BaseException] = []
        for what, group in zip(whats, await asyncio.gather(*reserving, return_exceptions=True), strict=True):
            if isinstance(group, BaseException):
                failed.append(group)
            else:
                pieces.append(_Piece(what, group))
        if failed:
            raise failed[0]

    async def _start_pipeline(self, structure: Structure, topology: Topology) -> ActorHandle:
        policy = self._config.policy
        describing = self._registry.describe.remote(structure.model_id, structure.revision)
        described: ModelDescription = await asyncio.wait_for(describing, policy.timeouts.describe_s)
        decoding = self._registry.text_decoder.remote(structure.model_id, structure.revision)
        text_decoder: str = await asyncio.wait_for(decoding, policy.timeouts.describe_s)
        return start_on_head(
            Pipeline,
            actor_name("pipeline", topology.model_id, topology.epoch),
            structure,
            topology,
            SchedulerConfig(
                num_blocks=topology.num_blocks,
                block_size=topology.block_size,
                prefill_chunk_tokens=policy.engine.prefill_chunk_tokens,
                max_running=policy.engine.max_running,
            ),
            described.architecture.eos_token_ids,
            text_decoder,
            self._config.pipeline_redis_url,
            policy.timeouts.step_s,
            max_concurrency=_PIPELINE_CONCURRENCY,
        )

    def _start_pieces(self, topology: Topology, pieces: Iterable[_Piece]) -> None:
        for piece in pieces:
            cls = LayerActor if isinstance(piece.what, Stage) else ExpertActor
            piece.actor = start_in_group(cls, _name(topology, piece.what), piece.group)

    async def _load(
        self, structure: Structure, topology: Topology, pieces: Sequence[_Piece], pipeline: ActorHandle
    ) -> None:
        stages = [piece for piece in pieces if isinstance(piece.what, Stage)]
        experts = {piece.what.index: piece.actor for piece in pieces if isinstance(piece.what, ExpertSet)}
        following = [piece.actor for piece in stages[1:]] + [None]
        await asyncio.gather(
            *(
                self._load_stage(structure, topology, piece, experts, after, pipeline)
                for piece, after in zip(stages, following, strict=True)
            ),
            *(self._load_experts(structure, p) for p in pieces if isinstance(p.what, ExpertSet)),
        )

    async def _load_stage(
        self, structure: Structure, topology: Topology, piece: _Piece, experts: Mapping[int, ActorHandle],
        after: ActorHandle | None, pipeline: ActorHandle,
    ) -> None:  # fmt: skip
        stage = piece.what
        assert isinstance(stage, Stage)
        assert piece.actor is not None
        names = [shard.name for shard in structure.edge_shards(stage.span.start, stage.span.end)]
        for layer in range(stage.span.start, stage.span.end):
            names.append(structure.layer_shard(layer).name)
            names += [structure.expert_shard(layer, e).name for e in stage.experts.get(layer, ())]
        paths, config_folder = await self._fetch(structure, stage.node_id, names)
        spec = StageSpec(
            structure=structure, stage=stage, epoch=topology.epoch, num_blocks=topology.num_blocks,
            block_size=topology.block_size, shard_paths=paths, config_folder=config_folder,
            device=self._nodes[stage.node_id].device, expert_sets=topology.expert_sets,
        )  # fmt: skip
        timeouts = self._config.policy.timeouts
        loading = piece.actor.load.remote(spec, experts, after, pipeline, timeouts.step_s)
        await asyncio.wait_for(loading, timeouts.load_s)

    async def _load_experts(self, structure: Structure, piece: _Piece) -> None:
        chosen = piece.what
        assert piece.actor is not None
        names = [
            structure.expert_shard(layer, expert).name
            for layer, experts in chosen.experts.items()
            for expert in experts
        ]
        paths, config_folder = await self._fetch(structure, chosen.node_id, names)
        device = self._nodes[chosen.node_id].device
        loading = piece.actor.load.remote(structure, chosen.experts, paths, config_folder, device)
        await asyncio.wait_for(loading, self._config.policy.timeouts.load_s)

    async def _fetch(
        self, structure: Structure, node_id: str, names: Sequence[str]
    ) -> tuple[dict[str, Path], Path]:
        fetching = self._agents[node_id].fetch.remote(structure, names, self._registry)
        fetched: tuple[dict[str, Path], Path] = await asyncio.wait_for(
            fetching, self._config.policy.timeouts.fetch_s
        )
        return fetched

    def _route(self, topology: Topology) -> Route:
        used = {node_id: self._nodes[node_id] for node_id in topology.vram_bytes_by_node}
        stages = [
            Placement(
                node=used[stage.node_id].name,
                actor=_name(topology, stage),
                layers=(stage.span.start, stage.span.end),
                experts=stage.experts,
            )
            for stage in topology.stages
        ]
        expert_sets = [
            Placement(
                node=used[chosen.node_id].name,
                actor=_name(topology, chosen),
                # It runs experts of these layers, but none of them whole.
                layers=(min(chosen.experts), min(chosen.experts)),
                experts=chosen.experts,
            )
            for chosen in topology.expert_sets
        ]
        return Route(
            payout_by_node={node_id: node.payout_address for node_id, node in used.items()},
            placements=(*stages, *expert_sets),
        )


def _name(topology: Topology, what: Stage | ExpertSet) -> str:
    kind = "layer" if isinstance(what, Stage) else "expert"
    return actor_name(kind, topology.model_id, topology.epoch, what.index)


def _take_down(pieces: Iterable[_Piece], pipeline: ActorHandle | None) -> None:
    if pipeline is not None:
        ray.kill(pipeline)
    for piece in pieces:
        release(piece.actor, piece.group)
