"""What a span of layers costs on a node: its time, the experts it cannot keep, what it has to fetch."""

import numpy as np
from numpy.typing import NDArray

from azu.planner.demand import Demand, running_sums, span_sums
from azu.planner.pool import Pool
from azu.units import MIB

Costs = NDArray[np.float64]

# What fetching a byte weighs: enough to decide between equal routes, far too little to choose a slower one.
_FETCH_S_PER_BYTE = 1e-19
_TRIFLE = 1e-9


class SpanCosts:
    """Costs of every span at once, in seconds of a step, without the frame that brings the hidden states.

    `price_s` is what a place for an expert is worth: a span that takes it away pays for it.
    """

    def __init__(self, demand: Demand, pool: Pool, price_s: float) -> None:
        self._demand, self._pool, self._price_s = demand, pool, price_s
        has_layers = span_sums(np.arange(demand.structure.num_layers + 1)) > 0
        self._stage_bytes = np.where(has_layers, demand.stage_bytes, np.inf)
        self._active_bytes = span_sums(demand.active_sums).astype(np.float64)
        self._experts = span_sums(running_sums(demand.num_experts)).astype(np.float64)
        self._experts_per_layer = max(demand.num_experts)
        self._expert_bytes = max(demand.expert_bytes)
        # Sizes in experts, a trifle less, so that what just fits does so in floats as well.
        self._stage_in_experts = demand.stage_bytes / max(1, self._expert_bytes) - _TRIFLE
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
        places = np.minimum(np.floor(left), self._experts)
        # A router asks its experts and waits for them: two frames for each layer that is spread.
        costs: Costs = np.ceil((self._experts - places) / self._experts_per_layer)
        costs *= 2 * self._demand.policy.hop_s
        if self._price_s:
            # What a stage leaves is handed out in whole MiB, to a set that has an overhead of its own.
            expert_in_mib = self._expert_bytes / MIB
            overhead = self._demand.expert_set_overhead_bytes / self._expert_bytes
            spare = np.floor((left - places) * expert_in_mib) / expert_in_mib
            places += np.maximum(0, np.floor(spare - overhead))
            costs += self._price_s * (max(0, np.floor(room - overhead)) - places)
        return costs
