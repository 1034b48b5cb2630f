"""One piece of a deployed model, on its node: brought up, linked, watched, taken down."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from actors.expert import ExpertActor
from actors.layer import LayerActor
from actors.link import as_azu_error
from actors.placement import CONTROL, actor_name, find_piece, release, reserve, start_in_group
from actors.site import Site
from azu.engine.spec import StageSpec
from azu.errors import AzuError, WorkerLost
from azu.planner.hot_experts import Counts
from azu.planner.shards import shards_of
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Stage, Topology

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

    async def num_chosen(self) -> Counts:
        """Ask a stage how often each expert was chosen; raises an AzuError when it does not say."""
        assert self.actor is not None
        asking = self.actor.num_chosen.options(concurrency_group=CONTROL).remote()
        try:
            counts: Counts = await asyncio.wait_for(asking, self._site.policy.timeouts.step_s)
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
