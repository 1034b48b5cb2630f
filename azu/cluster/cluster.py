"""Which models are deployed: plan one when a job needs it, make room when nothing else helps."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from azu.cluster.deployment import Builder, DeployedModel
from azu.cluster.deployment_store import DeploymentRecord, StandingModels
from azu.errors import AzuError, InsufficientCapacity, WorkerLost
from azu.jobs.dispatch import RunningModel
from azu.planner.migration import TopologyChange, better_placement, change_between, have_room
from azu.planner.plan import NEVER_FITS, check_total_capacity, plan
from azu.planner.policy import PlanPolicy
from azu.planner.replan import replan
from azu.planner.replicas import ExpertHeat, plan_replica, takes_spare_room, with_hot_replicas
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import PieceSet, PipelineKey, Topology

Sizes = Mapping[str, int]  # node id -> bytes
# Returns the nodes with the room that is left beside what is placed on them, some of which was given back
# and may be loaded still.
Nodes = Callable[[Sizes, Sizes], Sequence[Node]]


class Capacity:
    """What is left beside deployed models and promises; whoever plans holds `placing`."""

    def __init__(self, nodes: Nodes, models: Mapping[PipelineKey, DeployedModel]) -> None:
        self._nodes = nodes
        self._models = models
        self.promised: dict[PipelineKey, Sizes] = {}
        # One plan at a time: two must not promise the same room.
        self.placing = asyncio.Lock()

    def placed_bytes(self) -> dict[str, int]:
        """Return the VRAM taken on each node by what is deployed or being brought up."""
        placed = [model.topology.vram_bytes_by_node for model in self._models.values()]
        return sums([*placed, *self.promised.values()])

    def now(self, lost: Sizes | None = None) -> Sequence[Node]:
        """Return the nodes with their room; what is lost counts once it holds no memory any more."""
        return self._nodes(sums([self.placed_bytes(), negated(lost or {})]), {})

    def without(self, given_back: Sizes) -> Sequence[Node]:
        """Return the nodes with the room that there would be if some loaded pieces were gone."""
        return self._nodes(sums([self.placed_bytes(), negated(given_back)]), given_back)


def negated(sizes: Sizes) -> Sizes:
    """Return what gives as much as `sizes` take."""
    return {node_id: -size for node_id, size in sizes.items()}


def sums(sizes: Iterable[Sizes]) -> dict[str, int]:
    """Return what several take together."""
    total: Counter[str] = Counter()
    for by_node in sizes:
        total.update(by_node)
    return dict(total)


log = logging.getLogger(__name__)


class Cluster:
    """The deployed models. A model is deployed once, however many jobs ask for it at the same time; `widen`
    gives it more pipelines.
    """

    def __init__(
        self,
        builder: Builder,
        nodes: Nodes,
        policy: PlanPolicy,
        standing: StandingModels,
        *,
        nodes_come: bool = False,
    ) -> None:
        """Bring models up by `builder`; where `nodes_come` no model is too large to wait."""
        self._builder = builder
        self._standing = standing
        self._policy = policy
        self._nodes_come = nodes_come
        self._models: dict[PipelineKey, DeployedModel] = {}  # the least recently used first
        self._rooms = Capacity(nodes, self._models)
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self.deploying: set[tuple[str, str]] = set()

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """The models that are up."""
        return tuple(self._models.values())

    def placed_bytes(self) -> dict[str, int]:
        """Return the VRAM taken on each node by what is deployed or being brought up."""
        return self._rooms.placed_bytes()

    async def adopt(self) -> None:
        """Take over the models that another scheduler left standing; whatever else it left is taken down.

        The nodes must have been heard before.
        """
        written = await self._standing.all()
        living = await self._builder.sweep(_names(written))
        found: list[tuple[Structure, DeploymentRecord]] = []
        for standing in written:
            model_id, revision, _ = standing.topology.key
            try:
                if not living & standing.names:
                    raise WorkerLost("nothing of it lives")
                found.append((await self._builder.structure(model_id, revision), standing))
            except AzuError as error:
                log.warning("%s is not taken over: %s", model_id, error.message)
                await self._standing.forget(standing.topology)
        await self._builder.sweep(_names(standing for _, standing in found))
        for structure, standing in found:
            key = standing.topology.key
            adopting = self._builder.adopt(structure, standing, partial(self._replan, key))
            self._models[key] = await adopting

    async def ensure(self, model_id: str, revision: str, job_id: str) -> RunningModel:
        """Return the running model for a job, deploying it first when it is not up.

        A job goes where it is, any other to the pipeline with the fewest. Raises InsufficientCapacity when
        the model does not fit even after idle ones were taken down; its code is "never_fits" when waiting
        does not help either.
        """
        async with self._locks.setdefault((model_id, revision), asyncio.Lock()):
            for one in self._pipelines(model_id, revision):
                if one.broken and self._models.pop(one.topology.key, None) is one:
                    await one.close()
            if pipelines := self._pipelines(model_id, revision):
                model = min(pipelines, key=lambda one: (not one.holds(job_id), one.running_jobs))
            else:
                model = await self._deploy(model_id, revision)
            self._models[model.topology.key] = self._models.pop(model.topology.key)
            model.expect(job_id)
            return model

    async def widen(self, model_id: str, revision: str) -> None:
        """Bring up one more pipeline of a running model on nodes of its own, where there are some.

        Other models keep the room that they need if a node dies; this one goes on in its other pipeline.
        """
        async with self._rooms.placing:
            running = self._pipelines(model_id, revision)
            if not running:
                return
            structure, topologies = running[0].structure, [one.topology for one in running]
            nodes = self._rooms.now()
            epoch = await self._standing.next_epoch()
            topology = plan_replica(structure, topologies, nodes, self._policy, epoch=epoch)
            others = [(one.structure, one.topology) for one in self._models.values() if one not in running]
            if topology is None or takes_spare_room(topology.vram_bytes_by_node, others, nodes, self._policy):
                return
            self._rooms.promised[topology.key] = topology.vram_bytes_by_node
        log.warning("%s gets pipeline %d", model_id, topology.replica)
        await self._bring_up(structure, topology)

    def _pipelines(self, model_id: str, revision: str) -> list[DeployedModel]:
        return [one for key, one in self._models.items() if key[:2] == (model_id, revision)]

    def node_died(self, node_id: str) -> None:
        """Tell every model that a node is dead."""
        for model in self._models.values():
            model.node_died(node_id)

    async def vacate(self, node_id: str) -> bool:
        """Move what is on a node elsewhere, as far as there is room; say whether anything moves.

        Streams stop while what moves is loaded and filled; what finds no room stays where it is.
        """
        moves = False
        for model in self._models.values():
            loss = model.topology.on_node(node_id)
            if not loss:
                continue
            try:
                self._find_elsewhere(model, loss, node_id)
            except InsufficientCapacity as error:
                log.info("what is on %s stays: %s", node_id[:8], error.message)
                continue
            moves = True
            model.node_died(node_id)
        return moves

    def _find_elsewhere(self, model: DeployedModel, loss: PieceSet, node_id: str) -> None:
        """Raise InsufficientCapacity unless other nodes have room for some pieces."""
        others = [node for node in self._rooms.now() if node.node_id != node_id]
        replan(model.structure, model.topology, loss, others, self._policy, epoch=model.topology.epoch + 1)

    async def improve(self, model: DeployedModel) -> bool:
        """Move a model to where a plan over the nodes that there are now has it, if that is worth it.

        It serves meanwhile, but for as long as it takes to fill what moves. Says whether a move was tried.
        """
        before = model.topology
        nodes = self._rooms.without(before.vram_bytes_by_node)
        # A plan takes a second where there are a thousand nodes.
        change = await asyncio.to_thread(better_placement, model.structure, before, nodes, self._policy)
        return change is not None and await self._change(model, before, change)

    async def replicate(self, model: DeployedModel, heat: ExpertHeat) -> bool:
        """Hold the hot experts of a model a second time where nobody needs the room, and no others.

        Says whether a change was tried.
        """
        before = model.topology
        nodes = self._rooms.without(before.vram_bytes_of(before.replicas))
        models = [(one.structure, one.topology) for one in self._models.values()]

        def wanted() -> Topology:
            hot = with_hot_replicas(model.structure, before, nodes, self._policy, heat)
            for one in (hot, before):
                if not takes_spare_room(one.vram_bytes_of(one.replicas), models, nodes, self._policy):
                    return one
            return before.without(before.replicas)

        change = change_between(before, await asyncio.to_thread(wanted))
        return bool(change.gone or change.fresh) and await self._change(model, before, change)

    async def _change(self, model: DeployedModel, before: Topology, change: TopologyChange) -> bool:
        """Have a model change its places, if there is room and nothing came between; say if it was tried."""
        key = before.key
        async with self._rooms.placing:
            if self._models.get(key) is not model or model.topology is not before:
                return False
            given_back = before.vram_bytes_of(change.gone)
            beside = have_room(change.fresh_bytes, self._rooms.now())
            if not beside and not have_room(change.fresh_bytes, self._rooms.without(given_back)):
                return False
            change = replace(change, topology=await self._with_epoch(change.topology))
            needed = sums([change.fresh_bytes, {} if beside else negated(given_back)])
            self._rooms.promised[key] = needed
        try:
            await model.move(change, partial(self._commit, key, change.topology), beside=beside)
        finally:
            if self._rooms.promised.get(key) is needed:
                del self._rooms.promised[key]
        return True

    async def _commit(self, key: PipelineKey, topology: Topology) -> Topology:
        """Have a planned topology run, under an epoch that is newer than those of its pieces."""
        async with self._rooms.placing:
            topology = await self._with_epoch(topology)
            self._rooms.promised.pop(key, None)
            self._models[key].topology = topology
            return topology

    async def _with_epoch(self, topology: Topology) -> Topology:
        return replace(topology, epoch=await self._standing.next_epoch())

    async def close(self) -> None:
        """Take every model down."""
        while self._models:
            _, model = self._models.popitem()
            await model.close()

    async def _deploy(self, model_id: str, revision: str) -> DeployedModel:
        self.deploying.add((model_id, revision))
        try:
            structure = await self._builder.structure(model_id, revision)
            async with self._rooms.placing:
                topology = await self._plan(structure)
                self._rooms.promised[topology.key] = topology.vram_bytes_by_node
            return await self._bring_up(structure, topology)
        finally:
            self.deploying.discard((model_id, revision))

    async def _bring_up(self, structure: Structure, topology: Topology) -> DeployedModel:
        key = topology.key
        try:
            building = self._builder.build(structure, topology, partial(self._replan, key))
            self._models[key] = model = await building
            return model
        finally:
            self._rooms.promised.pop(key, None)

    async def _plan(self, structure: Structure) -> Topology:
        def on(nodes: Sequence[Node], epoch: int) -> Topology:
            try:
                return plan(structure, nodes, self._policy, epoch=epoch)
            except InsufficientCapacity:
                if not self._nodes_come:
                    check_total_capacity(structure, nodes, self._policy)
                raise

        return await self._place((structure.model_id, structure.revision, 0), on, {})

    async def _replan(self, key: PipelineKey, loss: PieceSet) -> Topology:
        async with self._rooms.placing:
            model = self._models[key]
            before = model.topology

            def on(nodes: Sequence[Node], epoch: int) -> Topology:
                return replan(model.structure, before, loss, nodes, self._policy, epoch=epoch)

            model.topology = await self._place(key, on, before.vram_bytes_of(loss))
            return model.topology

    async def _place(
        self, key: PipelineKey, on: Callable[[Sequence[Node], int], Topology], given_back: Mapping[str, int]
    ) -> Topology:
        """Plan on the nodes as they are; while there is no room, idle models of others are taken down."""
        while True:
            epoch = await self._standing.next_epoch()
            try:
                # What is lost may hold its memory still: it counts as free once it is reported so.
                return on(self._rooms.now(given_back), epoch)
            except InsufficientCapacity as error:
                idle = [other for other, one in self._models.items() if other != key and not one.running_jobs]
                if not idle or error.code == NEVER_FITS:
                    raise
                log.info("taking %s down to make room for %s", idle[0][0], key[0])
                await self._models.pop(idle[0]).close()


def _names(standing: Iterable[DeploymentRecord]) -> frozenset[str]:
    return frozenset[str]().union(*(one.names for one in standing))
