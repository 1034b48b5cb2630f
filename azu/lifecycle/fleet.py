"""Which models are deployed: plan one when a job needs it, make room when nothing else helps."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

from azu.errors import AzuError, InsufficientCapacity, WorkerLost
from azu.lifecycle.dispatch import RunningModel
from azu.lifecycle.standing import Standing, StandingModels
from azu.planner.admission import NEVER_FITS, refuse_what_no_waiting_helps
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.planner.replan import replan
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import Loss, Topology

log = logging.getLogger(__name__)

ModelKey = tuple[str, str]  # model id, revision
# Where a model's lost pieces go: a topology of a newer epoch. Raises InsufficientCapacity when nowhere.
Replan = Callable[[Loss], Awaitable[Topology]]


class DeployedModel(RunningModel, Protocol):
    """A running model that the fleet may also take down."""

    # Where its pieces are; the fleet sets it when some were lost.
    topology: Topology

    @property
    def structure(self) -> Structure:
        """What it is made of."""

    @property
    def running_jobs(self) -> int:
        """Jobs that have not ended."""

    @property
    def broken(self) -> bool:
        """Whether what was lost could not be replaced: it takes no new jobs."""

    def node_died(self, node_id: str) -> None:
        """Hear that a node is dead, or is to be left: what it holds comes up elsewhere."""

    async def resize(self, num_blocks: int) -> None:
        """Have another number of KV blocks; those that sequences need alone are kept."""

    async def close(self) -> None:
        """Take every piece down."""


class Builder(Protocol):
    """Cuts models and brings their pieces up on nodes."""

    async def structure(self, model_id: str, revision: str) -> Structure:
        """Return the structure of a model, cutting it first when nobody has."""

    async def build(self, structure: Structure, topology: Topology, replan: Replan) -> DeployedModel:
        """Bring up every piece of a topology; what was half up is taken down when it fails.

        `replan` is for pieces that are lost later.
        """

    async def adopt(self, structure: Structure, standing: Standing, replan: Replan) -> DeployedModel:
        """Take over a model that another scheduler brought up; what of it is gone is brought up again."""

    async def sweep(self, kept: frozenset[str]) -> frozenset[str]:
        """Take down every actor of a model but those of these names; return which of these live."""


class Fleet:
    """The deployed models. A model is deployed once, however many jobs ask for it at the same time."""

    def __init__(
        self,
        builder: Builder,
        nodes: Callable[[dict[str, int]], Sequence[Node]],
        policy: PlanPolicy,
        standing: StandingModels,
        *,
        nodes_come: bool = False,
    ) -> None:
        """Bring models up by `builder`; where `nodes_come` no model is too large to wait."""
        self._builder = builder
        self._standing = standing
        self._nodes = nodes
        self._policy = policy
        self._nodes_come = nodes_come
        self._models: dict[ModelKey, DeployedModel] = {}  # the least recently used first
        self._locks: dict[ModelKey, asyncio.Lock] = {}
        self._promised: dict[ModelKey, Topology] = {}
        # One plan at a time: two must not promise the same room.
        self._placing = asyncio.Lock()
        self.deploying: set[ModelKey] = set()

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """The models that are up."""
        return tuple(self._models.values())

    def placed_bytes(self) -> dict[str, int]:
        """Return the VRAM taken on each node by what is deployed or being brought up."""
        topologies = [model.topology for model in self._models.values()]
        return _sums(topology.vram_bytes_by_node for topology in (*topologies, *self._promised.values()))

    async def adopt(self) -> None:
        """Take over the models that another scheduler left standing; whatever else it left is taken down.

        The nodes must have been heard before.
        """
        written = await self._standing.all()
        living = await self._builder.sweep(_names(written))
        found: list[tuple[ModelKey, Structure, Standing]] = []
        for standing in written:
            key = (standing.topology.model_id, standing.topology.revision)
            try:
                if not living & standing.names:
                    raise WorkerLost("nothing of it lives")
                found.append((key, await self._builder.structure(*key), standing))
            except AzuError as error:
                log.warning("%s is not taken over: %s", key[0], error.message)
                await self._standing.forget(standing.topology)
        await self._builder.sweep(_names(standing for _, _, standing in found))
        for key, structure, standing in found:
            adopting = self._builder.adopt(structure, standing, partial(self._replan, key))
            self._models[key] = await adopting

    async def ensure(self, model_id: str, revision: str) -> RunningModel:
        """Return the running model, deploying it first when it is not up.

        Raises InsufficientCapacity when it does not fit even after idle models were taken down; its code is
        "never_fits" when waiting does not help either.
        """
        key = (model_id, revision)
        async with self._locks.setdefault(key, asyncio.Lock()):
            model = self._models.pop(key, None)
            if model is not None and model.broken:
                await model.close()
                model = None
            if model is None:
                model = await self._deploy(key)
            self._models[key] = model
            return model

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

    def _find_elsewhere(self, model: DeployedModel, loss: Loss, node_id: str) -> None:
        """Raise InsufficientCapacity unless other nodes have room for some pieces."""
        others = [node for node in self._nodes(self.placed_bytes()) if node.node_id != node_id]
        replan(model.structure, model.topology, loss, others, self._policy, epoch=model.topology.epoch + 1)

    async def close(self) -> None:
        """Take every model down."""
        while self._models:
            _, model = self._models.popitem()
            await model.close()

    async def _deploy(self, key: ModelKey) -> DeployedModel:
        self.deploying.add(key)
        try:
            structure = await self._builder.structure(*key)
            async with self._placing:
                self._promised[key] = await self._plan(structure)
            self._models[key] = model = await self._builder.build(
                structure, self._promised[key], partial(self._replan, key)
            )
            return model
        finally:
            self._promised.pop(key, None)
            self.deploying.discard(key)

    async def _plan(self, structure: Structure) -> Topology:
        def on(nodes: Sequence[Node], epoch: int) -> Topology:
            try:
                return plan(structure, nodes, self._policy, epoch=epoch)
            except InsufficientCapacity:
                if not self._nodes_come:
                    refuse_what_no_waiting_helps(structure, nodes, self._policy)
                raise

        return await self._place((structure.model_id, structure.revision), on, {})

    async def _replan(self, key: ModelKey, loss: Loss) -> Topology:
        async with self._placing:
            model = self._models[key]
            before = model.topology

            def on(nodes: Sequence[Node], epoch: int) -> Topology:
                return replan(model.structure, before, loss, nodes, self._policy, epoch=epoch)

            given_back = {node_id: -size for node_id, size in before.vram_bytes_of(loss).items()}
            model.topology = await self._place(key, on, given_back)
            return model.topology

    async def _place(
        self, key: ModelKey, on: Callable[[Sequence[Node], int], Topology], given_back: Mapping[str, int]
    ) -> Topology:
        """Plan on the nodes as they are; while there is no room, idle models of others are taken down."""
        while True:
            epoch = await self._standing.next_epoch()
            try:
                return on(self._nodes(_sums([self.placed_bytes(), given_back])), epoch)
            except InsufficientCapacity as error:
                idle = [other for other, one in self._models.items() if other != key and not one.running_jobs]
                if not idle or error.code == NEVER_FITS:
                    raise
                log.info("taking %s down to make room for %s", idle[0][0], key[0])
                await self._models.pop(idle[0]).close()


def _names(standing: Iterable[Standing]) -> frozenset[str]:
    return frozenset[str]().union(*(one.names for one in standing))


def _sums(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for by_node in sizes:
        total.update(by_node)
    return dict(total)
