"""Keeps what stands within the memory there is: KV shrinks and grows again, pieces leave nodes."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from azu.lifecycle.deployed import DeployedModel
from azu.planner.policy import PlanPolicy
from azu.planner.shrink import Placed, ShrinkOrder, blocks_again, shrink_orders
from azu.protocol.node import Node, NodeState
from azu.protocol.topology import PipelineKey

log = logging.getLogger(__name__)

# After a change a model is left alone for so long: it computes again what it lost, and reports follow.
_SETTLE_S = 5.0


class Models(Protocol):
    """The deployed models."""

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """Those that are up."""

    async def vacate(self, node_id: str) -> bool:
        """Move what is on a node elsewhere, as far as there is room; say whether anything moves."""


class Fitting:
    """Looks at what nodes report once a second, and acts on what lasts."""

    def __init__(self, fleet: Models, policy: PlanPolicy) -> None:
        self._fleet = fleet
        self._most_blocks = policy.num_blocks
        self._least_blocks = policy.num_blocks // policy.promised_sequences
        self._alone_until_s: dict[str | PipelineKey, float] = {}

    def orders(self, reports: Sequence[Node]) -> tuple[ShrinkOrder, ...]:
        """Return which models have to give up KV, for nodes that have less room than was planned."""
        return shrink_orders(self._placed(), reports)

    async def look(self, reports: Sequence[Node], now_s: float) -> None:
        """Have models and nodes changed as the reports ask for."""
        orders = {order.key: order for order in self.orders(reports)}
        await self._resize(orders, reports, now_s)
        for node in reports:
            if self._has_to_be_left(node, orders) and self._takes_changes(node.node_id, now_s):
                if await self._fleet.vacate(node.node_id):
                    log.warning("pieces leave %s", node.name)
                self._leave_alone(node.node_id, now_s)

    async def _resize(
        self, orders: Mapping[PipelineKey, ShrinkOrder], reports: Sequence[Node], now_s: float
    ) -> None:
        models = self._fleet.models
        again = blocks_again(self._placed(), reports)
        for model, blocks in zip(models, again, strict=True):
            topology = model.topology
            order = orders.get(topology.key)
            wanted = order.num_blocks if order else blocks
            if wanted == topology.num_blocks or not self._takes_changes(topology.key, now_s):
                continue
            log.warning("%s has %d blocks of KV now, not %d", topology.model_id, wanted, topology.num_blocks)
            self._leave_alone(topology.key, now_s)
            await model.resize(wanted)

    def _has_to_be_left(self, node: Node, orders: Mapping[PipelineKey, ShrinkOrder]) -> bool:
        """Say whether pieces have to go: the owner leaves, or no KV that could be given up is enough."""
        if node.state is NodeState.LEAVING:
            return True
        lacking = [
            model
            for model in self._fleet.models
            if node.node_id in model.topology.vram_bytes_by_node
            and (order := orders.get(model.topology.key))
            and order.missing_bytes
        ]
        return bool(lacking) and node.room_bytes(self._taken()[node.node_id]) < 0

    def _placed(self) -> list[Placed]:
        return [
            Placed(model.structure, model.topology, self._least_blocks, self._most_blocks)
            for model in self._fleet.models
        ]

    def _taken(self) -> Counter[str]:
        taken: Counter[str] = Counter()
        for model in self._fleet.models:
            taken.update(model.topology.vram_bytes_by_node)
        return taken

    def _takes_changes(self, what: str | PipelineKey, now_s: float) -> bool:
        return now_s >= self._alone_until_s.get(what, now_s)

    def _leave_alone(self, what: str | PipelineKey, now_s: float) -> None:
        self._alone_until_s[what] = now_s + _SETTLE_S
