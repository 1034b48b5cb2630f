"""The best plan of a small network by exhaustive search. All experts have the same size."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations

from azu.planner.demand import MemoryDemand
from azu.planner.node_pool import NodePool, link_s
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.units import MIB


def best_tokens_per_s(structure: Structure, nodes: Sequence[Node], policy: PlanPolicy) -> float | None:
    """Return the highest predicted speed of any route, or None when no route fits."""
    demand = MemoryDemand.of(structure, policy)
    pool = NodePool.of(nodes, demand)
    times = [_seconds(demand, pool, route) for route in _routes(len(pool.nodes), structure.num_layers)]
    found = [seconds for seconds in times if seconds is not None]
    return policy.batch_size / min(found) if found else None


def _routes(num_nodes: int, num_layers: int) -> Iterator[list[tuple[int, int, int]]]:
    for num_stages in range(1, min(num_nodes, num_layers) + 1):
        for cuts in combinations(range(1, num_layers), num_stages - 1):
            ends = [0, *cuts, num_layers]
            for order in permutations(range(num_nodes), num_stages):
                yield list(zip(order, ends[:-1], ends[1:], strict=True))


def _seconds(demand: MemoryDemand, pool: NodePool, route: list[tuple[int, int, int]]) -> float | None:
    expert = max(demand.expert_bytes)
    left = list(pool.room_bytes)
    waiting, layers_apart, computing = 0, 0, 0.0
    for node, start, end in route:
        left[node] -= demand.stage_bytes[start, end]
        if left[node] < 0:
            return None
        computing += (demand.active_sums[end] - demand.active_sums[start]) * pool.seconds_per_byte[node]
        for layer in range(start, end):
            count = demand.num_experts[layer]
            kept = min(count, left[node] // expert) if count else 0
            left[node] -= kept * expert
            waiting += count - kept
            layers_apart += kept < count
        left[node] = left[node] // MIB * MIB
    if waiting > sum(max(0, (room - demand.expert_set_overhead_bytes) // expert) for room in left if expert):
        return None
    hop_s = demand.policy.hop_s
    between = [
        link_s(pool.nodes[node], pool.nodes[after], hop_s) for (node, *_), (after, *_) in pairwise(route)
    ]
    return float(sum(between) + (2 + 2 * layers_apart) * hop_s + computing)
