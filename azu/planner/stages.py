"""Layers onto nodes: the fastest cut of the layers into spans, each within its node's memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from azu.planner.demand import Demand, running_sums, span_sums
from azu.planner.pool import Pool
from azu.protocol.topology import LayerSpan
from azu.units import MIB

# What fetching a byte weighs: enough to decide between equal routes, far too little to choose a slower one.
_FETCH_S_PER_BYTE = 1e-19
# Sums of floats differ by less than this when their parts are the same.
_NOISE = 1e-12
_TRIFLE = 1e-9


@dataclass(frozen=True, slots=True)
class Route:
    """Consecutive spans, each with its node's index in the pool.

    `cost` is the time of one step at the policy's batch, counted as if experts that go apart ran as fast as
    beside their router, but two frames away; what has to be fetched breaks ties. It includes the price of
    the room for experts that the route takes away.
    """

    spans: tuple[tuple[int, LayerSpan], ...]
    cost: float


def best_routes(demand: Demand, pool: Pool, *, price_s: float) -> list[Route]:
    """Return the best route of each node order, the very best first.

    `price_s` is what a place for an expert is worth: 0 gives the fastest routes, a high one those that leave
    the most room for experts. Any of them may leave too little.
    """
    searches = [_Search(demand, pool, order, price_s) for order in _orders(pool)]
    routes = [search.route() for search in searches if search.reach == demand.structure.num_layers]
    return sorted(routes, key=lambda route: float(f"{route.cost:.9e}"))


def longest_route(demand: Demand, pool: Pool) -> Route:
    """Return the route that gets furthest, when none gets to the end."""
    searches = [_Search(demand, pool, order, price_s=0) for order in _orders(pool)]
    return max(searches, key=lambda search: search.reach).route()


def _orders(pool: Pool) -> Iterator[Sequence[int]]:
    """Yield orders in which nodes may follow each other in a pipeline.

    Each sorts by what a node is, never by its neighbours: one more node leaves all routes of the others
    possible. Time per token is a sum, the same in every order; room at the ends is not.
    """
    by_id = range(len(pool.nodes))
    yield by_id
    yield sorted(by_id, key=lambda node: pool.room_bytes[node])
    yield sorted(by_id, key=lambda node: -pool.room_bytes[node])


class _Search:
    """Dynamic programming over nodes in one order; each takes the next span or is left out.

    Leaving out is always allowed, so one more node never makes the best route slower. Ties go to the node
    that comes first. O(nodes x layers^2), vectorised over layers.
    """

    def __init__(self, demand: Demand, pool: Pool, order: Sequence[int], price_s: float) -> None:
        self._demand, self._pool, self._order, self._price_s = demand, pool, order, price_s
        num_ends = demand.structure.num_layers + 1
        has_layers = span_sums(np.arange(num_ends)) > 0
        self._stage_bytes = np.where(has_layers, demand.stage_bytes, np.inf)
        self._active_bytes = span_sums(demand.active_sums).astype(np.float64)
        self._experts = span_sums(running_sums(demand.num_experts)).astype(np.float64)
        self._experts_per_layer = max(demand.num_experts)
        self._expert_bytes = max(demand.expert_bytes)
        # Sizes in experts, a trifle less, so that what just fits does so in floats as well.
        self._stage_in_experts = demand.stage_bytes / max(1, self._expert_bytes) - _TRIFLE
        self._costs = np.full(num_ends, np.inf)
        self._costs[0] = demand.policy.hop_s  # the last stage's answer
        self._starts: list[NDArray[np.int64]] = []
        for node in order:
            self._extend(node)

    @property
    def reach(self) -> int:
        """How many layers from the first on have a route."""
        return int(np.flatnonzero(np.isfinite(self._costs)).max())

    def route(self) -> Route:
        """Return the best route as far as there is one."""
        spans: list[tuple[int, LayerSpan]] = []
        end = self.reach
        for node, starts in zip(reversed(self._order), reversed(self._starts), strict=True):
            if end and (start := int(starts[end])) >= 0:
                spans.append((node, LayerSpan(start, end)))
                end = start
        assert end == 0, "every route begins at layer 0"
        return Route(tuple(reversed(spans)), float(self._costs[self.reach]))

    def _extend(self, node: int) -> None:
        """Let a node take the last span of any route so far."""
        total = self._span_costs(node)
        total += self._costs[:, None]
        starts = total.argmin(axis=0)
        costs = total[starts, np.arange(len(starts))]
        better = costs < self._costs * (1 - _NOISE)
        self._costs = np.where(better, costs, self._costs)
        self._starts.append(np.where(better, starts, -1))

    def _span_costs(self, node: int) -> NDArray[np.float64]:
        """Return [start, end] -> cost of a span on a node, infinite where it does not fit."""
        costs: NDArray[np.float64] = self._active_bytes * self._pool.seconds_per_byte[node]
        costs += self._demand.policy.hop_s
        if self._expert_bytes:
            costs += self._expert_costs(float(self._pool.room_bytes[node]))
        cached = self._pool.cached_bytes[node]
        if cached.any():
            costs -= _FETCH_S_PER_BYTE * span_sums(running_sums(cached))
        costs[self._stage_bytes > self._pool.room_bytes[node]] = np.inf
        return costs

    def _expert_costs(self, room_bytes: float) -> NDArray[np.float64]:
        """Return [start, end] -> cost of the experts that a node with that room cannot keep."""
        room = room_bytes / self._expert_bytes
        left = room - self._stage_in_experts
        places = np.minimum(np.floor(left), self._experts)
        # A router asks its experts and waits for them: two frames for each layer that is spread.
        costs = np.ceil((self._experts - places) / self._experts_per_layer)
        costs *= 2 * self._demand.policy.hop_s
        if self._price_s:
            # What a stage leaves is handed out in whole MiB, to a set that has an overhead of its own.
            expert_in_mib = self._expert_bytes / MIB
            overhead = self._demand.expert_set_overhead_bytes / self._expert_bytes
            spare = np.floor((left - places) * expert_in_mib) / expert_in_mib
            places += np.maximum(0, np.floor(spare - overhead))
            costs += self._price_s * (max(0, np.floor(room - overhead)) - places)
        return costs
