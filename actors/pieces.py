"""The pieces of one deployed model: stages and expert sets on their nodes, watched while they live."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from actors.expert import ExpertActor
from actors.layer import LayerActor
from actors.link import as_azu_error
from actors.placement import CONTROL, actor_name, find_piece, release, reserve, start_in_group
from actors.seat import PipelineSeat
from azu.config import NetworkPolicy
from azu.engine.spec import StageSpec
from azu.errors import AzuError, WorkerLost
from azu.lifecycle.standing import StandingPiece
from azu.protocol.job import Placement
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Loss, Stage, Topology

log = logging.getLogger(__name__)

Key = tuple[type[Stage] | type[ExpertSet], int]  # kind of piece, index


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


@dataclass(slots=True)
class _Piece:
    """A stage or expert set on its node; `epoch` is the one that it came up under."""

    what: Stage | ExpertSet
    epoch: int
    name: str
    group: PlacementGroup | None = None
    actor: ActorHandle | None = None
    watch: asyncio.Task[None] | None = None
    coming_up: asyncio.Task[None] | None = field(default=None, repr=False)


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
        lost: Callable[[Loss], None],
        resumed: Callable[[Topology], Awaitable[None]],
    ) -> None:
        self._site = site
        self._structure = structure
        self._seat = seat
        self._lost = lost
        self._resumed = resumed
        self._pieces: dict[Key, _Piece] = {}

    def placements(self) -> tuple[Placement, ...]:
        """Return the receipt's lines: which node runs what in which actor."""
        nodes = self._site.nodes
        pieces = sorted(
            self._pieces.values(), key=lambda one: (isinstance(one.what, ExpertSet), one.what.index)
        )
        return tuple(
            Placement(
                node=nodes[piece.what.node_id].name,
                actor=piece.name,
                layers=_whole_layers(piece.what),
                experts=piece.what.experts,
            )
            for piece in pieces
        )

    def standing(self) -> tuple[StandingPiece, ...]:
        """Return the pieces as they are written down."""
        return tuple(
            StandingPiece(kind is Stage, index, piece.epoch, piece.name)
            for (kind, index), piece in self._pieces.items()
        )

    async def adopt(self, topology: Topology, standing: Iterable[StandingPiece]) -> Loss:
        """Find pieces that somebody else brought up; return those that are gone."""
        pieces: tuple[Stage | ExpertSet, ...] = (*topology.stages, *topology.expert_sets)
        whats = {_key(what): what for what in pieces}
        for one in standing:
            what = whats[Stage if one.is_stage else ExpertSet, one.index]
            actor, group = await asyncio.to_thread(find_piece, one.name)
            if actor is None:
                release(None, group)
                continue
            piece = _Piece(what, one.epoch, one.name, group, actor)
            piece.watch = asyncio.create_task(self._watch(piece))
            self._pieces[_key(what)] = piece
        return _union(_loss_of(key) for key in whats.keys() - self._pieces.keys())

    async def pause(self) -> int:
        """Have the pipeline wait, whoever is the pipeline by then."""
        return await self._seat.pause()

    async def fence(self, loss: Loss) -> None:
        """Kill what is lost, whether it is dead or only seems so, and give its VRAM back."""
        for key in _keys(loss):
            if piece := self._pieces.pop(key, None):
                _take_down(piece)

    async def bring_up(self, topology: Topology, loss: Loss) -> Loss:
        """Bring lost pieces up; return those that it did not work for."""
        errors = await self.try_bring_up(topology, loss)
        for key, error in errors.items():
            log.warning("%s did not come up: %s", _loss_of(key), error.message)
        return _union(_loss_of(key) for key in errors)

    async def try_bring_up(self, topology: Topology, loss: Loss) -> Mapping[Key, AzuError]:
        """Bring pieces up where the topology has them; return what went wrong for which."""
        every: tuple[Stage | ExpertSet, ...] = (*topology.stages, *topology.expert_sets)
        wanted = [piece for piece in every if _key(piece) in _keys(loss)]
        coming = [_Piece(what, topology.epoch, _name(topology, what)) for what in wanted]
        self._pieces |= {_key(piece.what): piece for piece in coming}
        errors = await self._each(coming, self._start)
        started = [piece for piece in coming if _key(piece.what) not in errors]
        errors |= await self._each(started, lambda piece: self._load(topology, piece))
        for piece in started:
            if _key(piece.what) not in errors:
                piece.watch = asyncio.create_task(self._watch(piece))
        return errors

    async def relink(self, topology: Topology, fresh: Loss) -> Loss:
        """Tell every stage but the fresh ones its new neighbours; return those that did not take it."""
        survivors = [
            piece
            for key, piece in self._pieces.items()
            if key not in _keys(fresh) and isinstance(piece.what, Stage)
        ]
        errors = await self._each(survivors, lambda piece: self._relink(topology, piece))
        return _union(_loss_of(key) for key in errors)

    async def resume(self, topology: Topology, empty_stages: frozenset[int]) -> None:
        """Have the pipeline fill the empty stages and go on."""
        await self._seat.resume(topology, self.stages(), empty_stages)
        await self._resumed(topology)

    def stages(self) -> list[ActorHandle]:
        """Return the stages in order."""
        found = sorted((key[1], piece.actor) for key, piece in self._pieces.items() if key[0] is Stage)
        return [actor for _, actor in found]

    def still_there(self, loss: Loss, epoch: int) -> Loss:
        """Return what of a loss in an epoch was not replaced since."""
        return _union(
            _loss_of(key)
            for key in _keys(loss)
            if (piece := self._pieces.get(key)) is not None and piece.epoch <= epoch
        )

    def nodes_of(self, loss: Loss) -> frozenset[str]:
        """Return the nodes that hold some pieces."""
        return frozenset(self._pieces[key].what.node_id for key in _keys(loss) if key in self._pieces)

    def node_died(self, node_id: str) -> None:
        """Give up what is on a node, without waiting for its actors to say so."""
        for key, piece in self._pieces.items():
            if piece.what.node_id != node_id:
                continue
            if piece.coming_up is not None:
                piece.coming_up.cancel()
            else:
                self._lost(_loss_of(key))

    def take_down(self) -> None:
        """Take every piece down and give the VRAM back."""
        while self._pieces:
            _, piece = self._pieces.popitem()
            _take_down(piece)

    async def _each(
        self, pieces: Sequence[_Piece], action: Callable[[_Piece], Coroutine[Any, Any, None]]
    ) -> dict[Key, AzuError]:
        """Do something with several pieces at once; return the errors of those it failed for."""
        for piece in pieces:
            piece.coming_up = asyncio.create_task(action(piece))
        tasks = [piece.coming_up for piece in pieces if piece.coming_up is not None]
        try:
            done = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for piece in pieces:
                piece.coming_up = None
        errors: dict[Key, AzuError] = {}
        for piece, result in zip(pieces, done, strict=True):
            if isinstance(result, asyncio.CancelledError):
                errors[_key(piece.what)] = WorkerLost(f"the node of {piece.name} died")
            elif isinstance(result, Exception):
                errors[_key(piece.what)] = as_azu_error(result, piece.name)
            elif isinstance(result, BaseException):
                raise result
        return errors

    async def _start(self, piece: _Piece) -> None:
        what = piece.what
        timeout_s = self._site.policy.timeouts.placement_s
        piece.group = await reserve(piece.name, what.node_id, what.vram_bytes, timeout_s)
        cls = LayerActor if isinstance(what, Stage) else ExpertActor
        piece.actor = start_in_group(cls, piece.name, piece.group)

    async def _load(self, topology: Topology, piece: _Piece) -> None:
        assert piece.actor is not None
        if isinstance(piece.what, Stage):
            loading = await self._loading_stage(topology, piece.what, piece.actor)
        else:
            loading = await self._loading_experts(piece.what, piece.actor)
        await asyncio.wait_for(loading, self._site.policy.timeouts.load_s)

    async def _loading_stage(self, topology: Topology, stage: Stage, actor: ActorHandle) -> Awaitable[None]:
        structure = self._structure
        names = [shard.name for shard in structure.edge_shards(stage.span.start, stage.span.end)]
        for layer in range(stage.span.start, stage.span.end):
            names.append(structure.layer_shard(layer).name)
            names += [structure.expert_shard(layer, e).name for e in stage.experts.get(layer, ())]
        paths, config_folder = await self._fetch(stage.node_id, names)
        spec = StageSpec(
            structure=structure, stage=stage, epoch=topology.epoch, num_blocks=topology.num_blocks,
            block_size=topology.block_size, shard_paths=paths, config_folder=config_folder,
            device=self._site.nodes[stage.node_id].device, expert_sets=topology.expert_sets,
        )  # fmt: skip
        ack_timeout_s = self._site.policy.timeouts.step_s
        loading: Awaitable[None] = actor.load.remote(
            spec, self._expert_sets(), self._after(stage), self._seat.actor, ack_timeout_s
        )
        return loading

    async def _loading_experts(self, chosen: ExpertSet, actor: ActorHandle) -> Awaitable[None]:
        structure = self._structure
        names = [
            structure.expert_shard(layer, expert).name
            for layer, experts in chosen.experts.items()
            for expert in experts
        ]
        paths, config_folder = await self._fetch(chosen.node_id, names)
        device = self._site.nodes[chosen.node_id].device
        loading: Awaitable[None] = actor.load.remote(structure, chosen.experts, paths, config_folder, device)
        return loading

    async def _fetch(self, node_id: str, names: Sequence[str]) -> tuple[dict[str, Path], Path]:
        agent = self._site.agents.get(node_id)
        if agent is None:
            raise WorkerLost(f"node {node_id[:8]} is gone")
        fetching = agent.fetch.remote(self._structure, names)
        fetched: tuple[dict[str, Path], Path] = await asyncio.wait_for(
            fetching, self._site.policy.timeouts.fetch_s
        )
        return fetched

    async def _relink(self, topology: Topology, piece: _Piece) -> None:
        assert piece.actor is not None
        assert isinstance(piece.what, Stage)
        relink = piece.actor.relink.options(concurrency_group=CONTROL)
        answer = relink.remote(topology, self._expert_sets(), self._after(piece.what), self._seat.actor)
        await asyncio.wait_for(answer, self._site.policy.timeouts.step_s)

    def _expert_sets(self) -> dict[int, ActorHandle | None]:
        return {key[1]: piece.actor for key, piece in self._pieces.items() if key[0] is ExpertSet}

    def _after(self, stage: Stage) -> ActorHandle | None:
        piece = self._pieces.get((Stage, stage.index + 1))
        return piece.actor if piece else None

    async def _watch(self, piece: _Piece) -> None:
        """Hear at once when a piece's process dies, and after a while when it does not answer any more."""
        assert piece.actor is not None
        heartbeat = self._site.policy.heartbeat
        alive = piece.actor.alive.options(concurrency_group=CONTROL)
        try:
            while True:
                await asyncio.wait_for(
                    alive.remote(heartbeat.period_s), heartbeat.period_s + heartbeat.dead_s
                )
        except Exception as error:
            log.warning("%s", as_azu_error(error, piece.name).message)
            self._lost(_loss_of(_key(piece.what)))


def _take_down(piece: _Piece) -> None:
    if piece.watch is not None:
        piece.watch.cancel()
    release(piece.actor, piece.group)


def _name(topology: Topology, what: Stage | ExpertSet) -> str:
    kind = "layer" if isinstance(what, Stage) else "expert"
    return actor_name(kind, topology.model_id, topology.epoch, what.index)


def _whole_layers(what: Stage | ExpertSet) -> tuple[int, int]:
    """Return the span of layers that a piece runs; an expert set runs none of them whole."""
    if isinstance(what, Stage):
        return what.span.start, what.span.end
    return min(what.experts), min(what.experts)


def _key(what: Stage | ExpertSet) -> Key:
    return type(what), what.index


def _keys(loss: Loss) -> set[Key]:
    return {(Stage, index) for index in loss.stages} | {(ExpertSet, index) for index in loss.expert_sets}


def _loss_of(key: Key) -> Loss:
    kind, index = key
    only = frozenset({index})
    return Loss(stages=only) if kind is Stage else Loss(expert_sets=only)


def _union(losses: Iterable[Loss]) -> Loss:
    union = Loss()
    for loss in losses:
        union |= loss
    return union
