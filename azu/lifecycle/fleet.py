"""Which models are deployed: plan one when a job needs it, make room when nothing else helps."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from azu.errors import InsufficientCapacity
from azu.lifecycle.dispatch import RunningModel
from azu.planner.admission import refuse_what_no_waiting_helps
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology

log = logging.getLogger(__name__)

ModelKey = tuple[str, str]  # model id, revision


class DeployedModel(RunningModel, Protocol):
    """A running model that the fleet may also take down."""

    @property
    def topology(self) -> Topology:
        """Where its pieces are."""

    @property
    def structure(self) -> Structure:
        """What it is made of."""

    @property
    def running_jobs(self) -> int:
        """Jobs that have not ended."""

    @property
    def broken(self) -> bool:
        """Whether a piece was lost: it takes no new jobs."""

    async def close(self) -> None:
        """Take every piece down."""


class Builder(Protocol):
    """Cuts models and brings their pieces up on nodes."""

    async def structure(self, model_id: str, revision: str) -> Structure:
        """Return the structure of a model, cutting it first when nobody has."""

    async def build(self, structure: Structure, topology: Topology) -> DeployedModel:
        """Bring up every piece of a topology; what was half up is taken down when it fails."""


class Fleet:
    """The deployed models. A model is deployed once, however many jobs ask for it at the same time."""

    def __init__(
        self, builder: Builder, nodes: Callable[[dict[str, int]], Sequence[Node]], policy: PlanPolicy
    ) -> None:
        self._builder = builder
        self._nodes = nodes
        self._policy = policy
        self._models: dict[ModelKey, DeployedModel] = {}  # the least recently used first
        self._locks: dict[ModelKey, asyncio.Lock] = {}
        self._placing = asyncio.Lock()
        self._epoch = 0
        self.deploying: set[ModelKey] = set()

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """The models that are up."""
        return tuple(self._models.values())

    def placed_bytes(self) -> dict[str, int]:
        """Return the VRAM taken on each node by what is deployed."""
        placed: dict[str, int] = {}
        for model in self._models.values():
            for node_id, size in model.topology.vram_bytes_by_node.items():
                placed[node_id] = placed.get(node_id, 0) + size
        return placed

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

    async def close(self) -> None:
        """Take every model down."""
        while self._models:
            _, model = self._models.popitem()
            await model.close()

    async def _deploy(self, key: ModelKey) -> DeployedModel:
        self.deploying.add(key)
        try:
            structure = await self._builder.structure(*key)
            # One at a time: two plans must not promise the same room.
            async with self._placing:
                topology = await self._plan(structure)
                model = await self._builder.build(structure, topology)
                self._models[key] = model
                return model
        finally:
            self.deploying.discard(key)

    async def _plan(self, structure: Structure) -> Topology:
        while True:
            nodes = self._nodes(self.placed_bytes())
            try:
                self._epoch += 1
                return plan(structure, nodes, self._policy, epoch=self._epoch)
            except InsufficientCapacity:
                refuse_what_no_waiting_helps(structure, nodes, self._policy)
                idle = next((key for key, model in self._models.items() if not model.running_jobs), None)
                if idle is None:
                    raise
                log.info("taking %s down to make room for %s", idle[0], structure.model_id)
                await self._models.pop(idle).close()
