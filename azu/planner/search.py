"""Dynamic programming over nodes in one order: each takes the next span of layers or is left out.

Leaving out is always allowed, so one more node never makes the best route slower. Ties go to the node that
comes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from azu.planner.demand import Demand
from azu.planner.pool import Pool
from azu.planner.spans import Costs, SpanCosts
from azu.protocol.topology import LayerSpan

# Sums of floats differ by less than this when their parts are the same.
_NOISE = 1e-12


@dataclass(frozen=True, slots=True)
class Route:
    """Consecutive spans, each with its node's index in the pool.

    `cost` is the time of one step at the policy's batch, counted as if experts that go apart ran as fast as
    beside their router, but two frames away; what has to be fetched breaks ties. It includes the price of
    the room for experts that the route takes away.
    """

    spans: tuple[tuple[int, LayerSpan], ...]
    cost: float


class Search(Protocol):
    """A finished search."""

    @property
    def reach(self) -> int:
        """How many layers from the first on have a route."""

    def route(self) -> Route:
        """Return the best route as far as there is one."""


def search(demand: Demand, pool: Pool, costs: SpanCosts, order: Sequence[int]) -> Search:
    """Search the routes whose nodes follow each other in an order."""
    if pool.links_s is None:
        return _EqualLinks(demand, costs, order)
    return _MeasuredLinks(demand, costs, order, pool.links_s)


class _EqualLinks:
    """Every frame costs the same: which node held the layers before does not matter. O(nodes x layers^2)."""

    def __init__(self, demand: Demand, costs: SpanCosts, order: Sequence[int]) -> None:
        self._order = order
        num_ends = demand.structure.num_layers + 1
        self._costs = np.full(num_ends, np.inf)
        self._costs[0] = demand.policy.hop_s  # the last stage's answer
        self._starts: list[NDArray[np.int64]] = []
        for node in order:
            self._extend(costs.on(node) + demand.policy.hop_s)

    @property
    def reach(self) -> int:
        return _last_finite(self._costs)

    def route(self) -> Route:
        spans: list[tuple[int, LayerSpan]] = []
        end = self.reach
        for node, starts in zip(reversed(self._order), reversed(self._starts), strict=True):
            if end and (start := int(starts[end])) >= 0:
                spans.append((node, LayerSpan(start, end)))
                end = start
        assert end == 0, "every route begins at layer 0"
        return Route(tuple(reversed(spans)), float(self._costs[self.reach]))

    def _extend(self, total: Costs) -> None:
        """Let a node take the last span of any route so far."""
        total += self._costs[:, None]
        starts = total.argmin(axis=0)
        costs = total[starts, np.arange(len(starts))]
        better = costs < self._costs * (1 - _NOISE)
        self._costs = np.where(better, costs, self._costs)
        self._starts.append(np.where(better, starts, -1))


class _MeasuredLinks:
    """A frame costs what its link does, so that routes are kept by their last node. O(nodes^2 x layers)."""

    def __init__(
        self, demand: Demand, costs: SpanCosts, order: Sequence[int], links_s: NDArray[np.float64]
    ) -> None:
        self._order = order
        shape = (demand.structure.num_layers + 1, len(order))
        # By end and place in the order: the best route that ends there; its last start; the place before.
        self._costs = np.full(shape, np.inf)
        self._starts = np.zeros(shape, np.int64)
        self._before = np.zeros(shape, np.int64)
        rows = np.arange(shape[0])
        between_s = links_s[np.ix_(order, order)]
        for place, node in enumerate(order):
            arriving = np.full(shape[0], np.inf)
            if place:
                coming = self._costs[:, :place] + between_s[place, :place]
                self._before[:, place] = coming.argmin(axis=1)
                arriving = coming[rows, self._before[:, place]]
            # The first frame comes from the pipeline, and the last stage's answer goes there.
            arriving[0] = 2 * demand.policy.hop_s
            total = costs.on(node) + arriving[:, None]
            self._starts[:, place] = total.argmin(axis=0)
            self._costs[:, place] = total[self._starts[:, place], rows]

    @property
    def reach(self) -> int:
        return _last_finite(self._costs.min(axis=1, initial=np.inf))

    def route(self) -> Route:
        spans: list[tuple[int, LayerSpan]] = []
        end = self.reach
        if not end:
            return Route((), np.inf)
        place = int(self._costs[end].argmin())
        cost = float(self._costs[end, place])
        while end:
            start = int(self._starts[end, place])
            spans.append((self._order[place], LayerSpan(start, end)))
            place, end = int(self._before[start, place]), start
        return Route(tuple(reversed(spans)), cost)


def _last_finite(costs: Costs) -> int:
    found = np.flatnonzero(np.isfinite(costs))
    return int(found[-1]) if len(found) else 0
