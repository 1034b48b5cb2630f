"""The planner: a model's structure and the live nodes in, a topology or a clear "no" out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from azu.errors import InsufficientCapacity, InvalidRequest
from azu.planner.demand import MemoryDemand
from azu.planner.node_pool import NodePool
from azu.planner.policy import PlanPolicy
from azu.planner.prediction import predicted
from azu.planner.search import LayerRoute, best_routes, longest_route
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, LayerSpan, Stage, Topology
from azu.units import format_bytes

Experts = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
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


def spread_experts(demand: MemoryDemand, pool: NodePool, route: LayerRoute) -> ExpertPlacement:
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
    return ExpertPlacement(beside, holders.held, homeless)


def _kept_beside(demand: MemoryDemand, span: LayerSpan, room_bytes: int) -> Experts:
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

    def __init__(self, demand: MemoryDemand, pool: NodePool, left_bytes: NDArray[np.int64]) -> None:
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


def shortage(demand: MemoryDemand, pool: NodePool, tried: Sequence[ExpertPlacement]) -> InsufficientCapacity:
    """Return the error that says what a model needs, what there is, and what more nodes would have to have.

    `tried` are routes whose layers found room but whose experts did not.
    """
    structure, policy = demand.structure, demand.policy
    weights = sum(shard.weight_bytes for shard in structure.shards)
    tokens = policy.num_blocks * policy.block_size
    kv = sum(layer.kv_bytes_per_token for layer in structure.layers) * tokens
    rest, homeless = _left_over(demand, pool, tried)
    missing, what = 0, []
    if len(rest):
        missing += demand.stage_vram_bytes(rest, demand.all_experts(rest))
        what.append(f"layers {rest.start} to {rest.end - 1}")
    if homeless:
        missing += demand.expert_set_vram_bytes(homeless)
        what.append(
            f"{sum(map(len, homeless.values()))} experts of layers {min(homeless)} to {max(homeless)}"
        )
    return InsufficientCapacity(
        f"{structure.model_id} needs {format_bytes(weights)} for weights, {format_bytes(kv)} for the KV of "
        f"{policy.promised_sequences} sequences of {policy.tokens_per_sequence} tokens and "
        f"{format_bytes(demand.expert_set_overhead_bytes)} for activations and margin on each node; "
        f"{len(pool.nodes)} live nodes have {format_bytes(int(pool.room_bytes.sum()))} free: "
        f"{missing} bytes are missing on one more node for {' and '.join(what)}",
        missing_bytes=tuple(_by_node(demand, pool, rest, homeless)),
    )


def _left_over(
    demand: MemoryDemand, pool: NodePool, tried: Sequence[ExpertPlacement]
) -> tuple[LayerSpan, Experts]:
    """Return the layers and the experts that found no room."""
    num_layers = demand.structure.num_layers
    if tried:
        homeless = min((spread.homeless for spread in tried), key=demand.experts_bytes)
        return LayerSpan(num_layers, num_layers), homeless
    route = longest_route(demand, pool)
    placed = route.spans[-1][1].end if route.spans else 0
    return LayerSpan(placed, num_layers), spread_experts(demand, pool, route).homeless


def _by_node(demand: MemoryDemand, pool: NodePool, rest: LayerSpan, homeless: Experts) -> Iterator[int]:
    """Yield what each of several nodes would have to lend, none more than the largest that there is.

    What one layer needs is asked of one node, whatever the others are like.
    """
    largest = max((node.vram_total_bytes for node in pool.nodes), default=0)
    start = rest.start
    for end in range(rest.start + 1, rest.end + 1):
        further = LayerSpan(start, min(end + 1, rest.end))
        if end == rest.end or demand.stage_vram_bytes(further, demand.all_experts(further)) > largest:
            span = LayerSpan(start, end)
            yield demand.stage_vram_bytes(span, demand.all_experts(span))
            start = end
    for layer, experts in homeless.items():
        yield demand.expert_set_vram_bytes({layer: experts})


# What a place for one expert is worth, in frames.
_ROOM_PRICES = (0.0, 0.25, 1.0, 4.0, 1e6)


def plan(structure: Structure, nodes: Sequence[Node], policy: PlanPolicy, *, epoch: int = 1) -> Topology:
    """Place a model's layers and experts on live nodes, for the least time per token.

    The same input gives the same output, in whatever order the nodes come. Raises InsufficientCapacity that
    says how many bytes are missing and for what.
    """
    if not structure.layers:
        raise InvalidRequest(f"{structure.model_id} has no layers")
    demand = MemoryDemand.of(structure, policy)
    pool = NodePool.of(nodes, demand)
    tried: list[ExpertPlacement] = []
    # The fastest routes first; where their experts find no room, routes that leave more of it.
    every_layer = LayerSpan(0, structure.num_layers)
    enough = demand.stage_vram_bytes(every_layer, demand.all_experts(every_layer)) <= pool.room_bytes.sum()
    for price in _ROOM_PRICES if enough and any(demand.num_experts) else _ROOM_PRICES[:1]:
        for route in best_routes(demand, pool, price_s=price * policy.hop_s):
            spread = spread_experts(demand, pool, route)
            if not spread.homeless:
                return _topology(demand, pool, route, spread, epoch)
            tried.append(spread)
    raise shortage(demand, pool, tried)


def _topology(
    demand: MemoryDemand, pool: NodePool, route: LayerRoute, spread: ExpertPlacement, epoch: int
) -> Topology:
    structure, policy = demand.structure, demand.policy
    stages = tuple(
        Stage(
            index=index,
            node_id=pool.nodes[node].node_id,
            span=span,
            experts=experts,
            vram_bytes=demand.stage_vram_bytes(span, experts),
        )
        for index, ((node, span), experts) in enumerate(zip(route.spans, spread.beside, strict=True))
    )
    expert_sets = tuple(
        ExpertSet(
            index=index,
            node_id=pool.nodes[node].node_id,
            experts=experts,
            vram_bytes=demand.expert_set_vram_bytes(experts),
        )
        for index, (node, experts) in enumerate(sorted(spread.apart.items()))
    )
    return Topology(
        model_id=structure.model_id,
        revision=structure.revision,
        epoch=epoch,
        stages=stages,
        expert_sets=expert_sets,
        num_blocks=policy.num_blocks,
        block_size=policy.block_size,
        prediction=predicted(demand, pool.nodes, stages, expert_sets),
    )


# The code of errors that waiting does not help.
NEVER_FITS = "never_fits"


def check_kv_capacity(structure: Structure, topology: Topology, num_tokens: int) -> None:
    """Raise InvalidRequest with the bytes missing when `num_tokens` of one sequence never find room."""
    missing = -(-num_tokens // topology.block_size) - topology.num_blocks
    if missing <= 0:
        return
    kv_bytes_per_token = sum(layer.kv_bytes_per_token for layer in structure.layers)
    raise InvalidRequest(
        f"the prompt and its completion need KV for {num_tokens} tokens, {structure.model_id} has room for "
        f"{topology.num_blocks * topology.block_size}: "
        f"{missing * topology.block_size * kv_bytes_per_token} bytes are missing",
        code="insufficient_kv_cache",
    )


def check_total_capacity(structure: Structure, nodes: Sequence[Node], policy: PlanPolicy) -> None:
    """Raise InsufficientCapacity with the bytes missing when a model would not fit even on idle nodes.

    Nodes that are suspect now may come back; those that leave will not. Whoever passes may wait for room.
    """
    idle = [
        replace(node, vram_free_bytes=node.vram_total_bytes, state=NodeState.ALIVE)
        for node in nodes
        if node.state in (NodeState.ALIVE, NodeState.SUSPECT)
    ]
    try:
        plan(structure, idle, policy)
    except InsufficientCapacity as error:
        raise InsufficientCapacity(
            error.message, code=NEVER_FITS, missing_bytes=error.missing_bytes
        ) from error
