"""Find the fastest routes through a pool: spans of layers on consecutive nodes, by dynamic programming.

The search goes through the nodes in one order at a time; each node takes the next span of layers or is left
out. Because a node may always be left out, one more node never makes the best route slower. Ties go to the
node that comes first in the order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from azu.planner.demand import MemoryDemand, running_sums, span_sums
from azu.planner.node_pool import NodePool
from azu.protocol.topology import LayerSpan
from azu.units import MIB

Costs = NDArray[np.float64]

# The cost of fetching a byte decides between equal routes, and is far too small to choose a slower one.
_FETCH_S_PER_BYTE = 1e-19
# Sizes in experts are reduced by this, so that an exact fit is a fit in floats too.
_ROUNDING = 1e-9
# Sums of floats with equal parts differ by less than this fraction.
_NOISE = 1e-12
# The largest number of nodes that serve as centres, around which the others are sorted by their links.
_MOST_CENTRES = 6


@dataclass(frozen=True, slots=True)
class LayerRoute:
    """Consecutive spans, each with its node's index in the pool.

    `cost` is the time of one step at the policy's batch, as if experts apart from their router ran as fast as
    beside it, but two frames away. Bytes to be fetched break ties. The cost includes the price of the room
    for experts that the route takes away.
    """

    spans: tuple[tuple[int, LayerSpan], ...]
    cost: float


class Search(Protocol):
    """A finished search over one order of the nodes."""

    @property
    def reach(self) -> int:
        """The number of layers, from the first on, that have a route."""

    def route(self) -> LayerRoute:
        """Return the best route for the layers in reach."""


def best_routes(demand: MemoryDemand, pool: NodePool, *, price_s: float) -> list[LayerRoute]:
    """Return the best route of each node order, the best of all first.

    `price_s` is the price of room for one expert: 0 gives the fastest routes, a high price those that leave
    the most room for experts. Any of them may leave too little room.
    """
    searches = _searches(demand, pool, price_s)
    routes = [found.route() for found in searches if found.reach == demand.structure.num_layers]
    return sorted(routes, key=lambda route: float(f"{route.cost:.9e}"))


def longest_route(demand: MemoryDemand, pool: NodePool) -> LayerRoute:
    """Return the route with the most layers from the first on, for a pool in which no route has all."""
    return max(_searches(demand, pool, price_s=0), key=lambda found: found.reach).route()


def _searches(demand: MemoryDemand, pool: NodePool, price_s: float) -> list[Search]:
    costs = SpanCosts(demand, pool, price_s)
    if pool.links_s is None:
        return [_EqualLinks(demand, costs, order) for order in _orders(pool)]
    return [_MeasuredLinks(demand, costs, order, pool.links_s) for order in _orders(pool)]


def _orders(pool: NodePool) -> Iterator[Sequence[int]]:
    """Yield orders in which nodes may follow each other in a pipeline.

    Each order sorts by a property of the node itself or by its link to one centre: one more node keeps all
    routes of the others possible. Where all links are equal, the time per token is a sum and the same in each
    order, but the room at both ends is not.
    """
    by_id = range(len(pool.nodes))
    yield by_id
    yield sorted(by_id, key=lambda node: pool.room_bytes[node])
    yield sorted(by_id, key=lambda node: -pool.room_bytes[node])
    if pool.links_s is not None:
        for centre in by_id[:_MOST_CENTRES]:
            yield [int(node) for node in np.argsort(pool.links_s[centre], kind="stable")]


class _EqualLinks:
    """A search where all frames cost the same, whatever the previous node. O(nodes x layers^2)."""

    def __init__(self, demand: MemoryDemand, costs: "SpanCosts", order: Sequence[int]) -> None:
        self._order = order
        num_ends = demand.structure.num_layers + 1
        self._costs = np.full(num_ends, np.inf)
        self._costs[0] = demand.policy.hop_s  # the frame from the last stage
        self._starts: list[NDArray[np.int64]] = []
        for node in order:
            self._extend(costs.on(node) + demand.policy.hop_s)

    @property
    def reach(self) -> int:
        return _last_finite(self._costs)

    def route(self) -> LayerRoute:
        spans: list[tuple[int, LayerSpan]] = []
        end = self.reach
        for node, starts in zip(reversed(self._order), reversed(self._starts), strict=True):
            if end and (start := int(starts[end])) >= 0:
                spans.append((node, LayerSpan(start, end)))
                end = start
        assert end == 0, "every route begins at layer 0"
        return LayerRoute(tuple(reversed(spans)), float(self._costs[self.reach]))

    def _extend(self, total: Costs) -> None:
        """Extend each route so far by a last span on one more node, where that is better."""
        total += self._costs[:, None]
        starts = total.argmin(axis=0)
        costs = total[starts, np.arange(len(starts))]
        better = costs < self._costs * (1 - _NOISE)
        self._costs = np.where(better, costs, self._costs)
        self._starts.append(np.where(better, starts, -1))


class _MeasuredLinks:
    """A search where each link has its own cost: it keeps a route per last node. O(nodes^2 x layers)."""

    def __init__(
        self, demand: MemoryDemand, costs: "SpanCosts", order: Sequence[int], links_s: NDArray[np.float64]
    ) -> None:
        self._order = order
        shape = (demand.structure.num_layers + 1, len(order))
        # By end and place in the order: the cost of the best route, its last start, and its previous place.
        self._costs = np.full(shape, np.inf)
        self._starts = np.zeros(shape, np.int64)
        self._previous = np.zeros(shape, np.int64)
        rows = np.arange(shape[0])
        between_s = links_s[np.ix_(order, order)]
        for place, node in enumerate(order):
            arriving = np.full(shape[0], np.inf)
            if place:
                coming = self._costs[:, :place] + between_s[place, :place]
                self._previous[:, place] = coming.argmin(axis=1)
                arriving = coming[rows, self._previous[:, place]]
            # The first frame comes from the pipeline, and the frame from the last stage goes there.
            arriving[0] = 2 * demand.policy.hop_s
            total = costs.on(node) + arriving[:, None]
            self._starts[:, place] = total.argmin(axis=0)
            self._costs[:, place] = total[self._starts[:, place], rows]

    @property
    def reach(self) -> int:
        return _last_finite(self._costs.min(axis=1, initial=np.inf))

    def route(self) -> LayerRoute:
        spans: list[tuple[int, LayerSpan]] = []
        end = self.reach
        if not end:
            return LayerRoute((), np.inf)
        place = int(self._costs[end].argmin())
        cost = float(self._costs[end, place])
        while end:
            start = int(self._starts[end, place])
            spans.append((self._order[place], LayerSpan(start, end)))
            place, end = int(self._previous[start, place]), start
        return LayerRoute(tuple(reversed(spans)), cost)


def _last_finite(costs: Costs) -> int:
    found = np.flatnonzero(np.isfinite(costs))
    return int(found[-1]) if len(found) else 0


class SpanCosts:
    """The cost of each span on each node: seconds of a step, without the frame that brings hidden states.

    `price_s` is the price of room for one expert; a span pays for the room that it takes away.
    """

    def __init__(self, demand: MemoryDemand, pool: NodePool, price_s: float) -> None:
        self._demand, self._pool, self._price_s = demand, pool, price_s
        has_layers = span_sums(np.arange(demand.structure.num_layers + 1)) > 0
        self._stage_bytes = np.where(has_layers, demand.stage_bytes, np.inf)
        self._active_bytes = span_sums(demand.active_sums).astype(np.float64)
        self._experts = span_sums(running_sums(demand.num_experts)).astype(np.float64)
        self._experts_per_layer = max(demand.num_experts)
        self._expert_bytes = max(demand.expert_bytes)
        self._stage_in_experts = demand.stage_bytes / max(1, self._expert_bytes) - _ROUNDING
        self._known: dict[int, Costs] = {}

    def on(self, node: int) -> Costs:
        """Return [start, end] -> cost of a span on a node, infinite where it does not fit."""
        if node not in self._known:
            self._known[node] = self._costs(node)
        return self._known[node]

    def _costs(self, node: int) -> Costs:
        costs: Costs = self._active_bytes * self._pool.seconds_per_byte[node]
        if self._expert_bytes:
            costs += self._expert_costs(float(self._pool.room_bytes[node]))
        cached = self._pool.cached_bytes[node]
        if cached.any():
            costs -= _FETCH_S_PER_BYTE * span_sums(running_sums(cached))
        costs[self._stage_bytes > self._pool.room_bytes[node]] = np.inf
        return costs

    def _expert_costs(self, room_bytes: float) -> Costs:
        """Return [start, end] -> cost of the experts that a node with that room cannot keep."""
        room = room_bytes / self._expert_bytes
        left = room - self._stage_in_experts
        kept = np.minimum(np.floor(left), self._experts)
        # A router sends to its experts and waits for them: two frames for each layer with experts apart.
        costs: Costs = np.ceil((self._experts - kept) / self._experts_per_layer)
        costs *= 2 * self._demand.policy.hop_s
        if self._price_s:
            # The room beside a stage is assigned in whole MiB, to an expert set that has its own overhead.
            expert_in_mib = self._expert_bytes / MIB
            overhead = self._demand.expert_set_overhead_bytes / self._expert_bytes
            spare = np.floor((left - kept) * expert_in_mib) / expert_in_mib
            kept += np.maximum(0, np.floor(spare - overhead))
            costs += self._price_s * (max(0, np.floor(room - overhead)) - kept)
        return costs
