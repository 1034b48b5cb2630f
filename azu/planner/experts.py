"""Experts that do not fit beside their router, onto the nodes that have room."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from azu.planner.demand import Demand
from azu.planner.pool import Pool
from azu.planner.search import Route
from azu.protocol.topology import LayerSpan

Experts = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Spread:
    """Where the experts of a route are: beside each stage's routers, and by node index apart from them.

    `homeless` are those that found no room.
    """

    beside: tuple[Experts, ...]
    apart: Mapping[int, Experts]
    homeless: Experts

    @property
    def layers_apart(self) -> int:
        """Number of layers that have experts apart from their router."""
        return len({layer for experts in self.apart.values() for layer in experts})


def spread_experts(demand: Demand, pool: Pool, route: Route) -> Spread:
    """Keep experts beside their routers as far as they fit; the others go where there is room."""
    beside = tuple(_kept_beside(demand, span, int(pool.room_bytes[node])) for node, span in route.spans)
    left = pool.room_bytes.copy()
    for (node, span), kept in zip(route.spans, beside, strict=True):
        left[node] -= demand.stage_vram_bytes(span, kept)
    holders = _Holders(demand, pool, left)
    homeless: dict[int, tuple[int, ...]] = {}
    for (node, _), kept in zip(route.spans, beside, strict=True):
        for layer, ids in kept.items():
            waiting = tuple(range(len(ids), demand.num_experts[layer]))
            if rest := holders.take(layer, waiting, router=node):
                homeless[layer] = rest
    return Spread(beside, holders.held, homeless)


def _kept_beside(demand: Demand, span: LayerSpan, room_bytes: int) -> Experts:
    """Return the experts that stay: whole layers first, then the lowest ids of the first that does not fit.

    A layer with one expert apart waits for two frames, as one with all apart does: so as few as possible.
    """
    left = room_bytes - int(demand.stage_bytes[span.start, span.end])
    kept: dict[int, tuple[int, ...]] = {}
    is_full = False
    for layer in range(span.start, span.end):
        count = demand.num_experts[layer]
        if not count:
            continue
        fitting = 0 if is_full else min(count, left // demand.expert_bytes[layer])
        is_full = is_full or fitting < count
        left -= fitting * demand.expert_bytes[layer]
        kept[layer] = tuple(range(fitting))
    return kept


class _Holders:
    """Nodes that hold experts apart from their routers, each in one set."""

    def __init__(self, demand: Demand, pool: Pool, left_bytes: NDArray[np.int64]) -> None:
        self._demand, self._pool, self._left = demand, pool, left_bytes
        self._overhead = np.full(len(left_bytes), demand.expert_set_overhead_bytes)
        self.held: dict[int, dict[int, tuple[int, ...]]] = {}

    def take(self, layer: int, waiting: tuple[int, ...], router: int) -> tuple[int, ...]:
        """Give a layer's experts to nodes, on as few as possible; return those that found no room."""
        while waiting:
            node, fitting = self._best(layer, len(waiting), router)
            if not fitting:
                break
            self.held.setdefault(node, {})[layer] = waiting[:fitting]
            self._left[node] -= self._overhead[node] + fitting * self._demand.expert_bytes[layer]
            self._overhead[node] = 0
            waiting = waiting[fitting:]
        return waiting

    def _best(self, layer: int, wanted: int, router: int) -> tuple[int, int]:
        """Return the node that takes the most experts of a layer, and how many.

        Ties go to the node that is nearer to the router, to the faster one, to the one with more of the layer
        on its disk, to the lower id.
        """
        if not len(self._left):
            return 0, 0
        fitting = (self._left - self._overhead) // self._demand.expert_bytes[layer]
        fitting = np.clip(fitting, 0, wanted)
        fitting[router] = 0
        fitting[[node for node, experts in self.held.items() if layer in experts]] = 0
        links_s = self._pool.links_s
        nearness = np.zeros(len(fitting)) if links_s is None else links_s[router]
        cached = self._pool.cached_bytes[:, layer]
        ranked = np.lexsort((-cached, self._pool.seconds_per_byte, nearness, -fitting))
        return int(ranked[0]), int(fitting[ranked[0]])
