"""The room on the nodes, and who has been promised what of it."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from azu.lifecycle.deployed import DeployedModel
from azu.protocol.node import Node
from azu.protocol.topology import PipelineKey

Sizes = Mapping[str, int]  # node id -> bytes
# Returns the nodes with the room that is left beside what is placed on them, some of which was given back
# and may be loaded still.
Nodes = Callable[[Sizes, Sizes], Sequence[Node]]


class Rooms:
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
