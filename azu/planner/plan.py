"""Plan where a model's layers and experts go: a topology, or an error with the bytes that are missing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from azu.errors import InsufficientCapacity, InvalidRequest
from azu.planner.demand import MemoryDemand
from azu.planner.node_pool import NodePool
from azu.planner.policy import PlanPolicy
from azu.planner.prediction import predict_pieces
from azu.planner.search import LayerRoute, best_routes, longest_route
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, LayerSpan, Stage, Topology
from azu.units import format_bytes

ExpertIds = Mapping[int, tuple[int, ...]]  # layer -> expert ids

# The code of InsufficientCapacity when even idle nodes would not hold the model.
NEVER_FITS = "never_fits"
NO_WORKER = "No worker has joined. Run: azu join TICKET --vram 8GiB --payout 0x..."
# The prices of room for one expert that `plan` tries, in frames.
_EXPERT_ROOM_PRICES = (0.0, 0.25, 1.0, 4.0, 1e6)


def plan(structure: Structure, nodes: Sequence[Node], policy: PlanPolicy, *, epoch: int = 1) -> Topology:
    """Place a model's layers and experts on live nodes, for the least time per token.

    The same input gives the same topology, whatever the order of the nodes. Raises InsufficientCapacity that
    says how many bytes are missing and for what.
    """
    if not structure.layers:
        raise InvalidRequest(f"{structure.model_id} has no layers")
    demand = MemoryDemand.of(structure, policy)
    pool = NodePool.of(nodes, demand)
    tried: list[ExpertPlacement] = []
    # The fastest routes come first. Where their experts find no room, routes that leave more room follow.
    every_layer = LayerSpan(0, structure.num_layers)
    enough = demand.stage_vram_bytes(every_layer, demand.all_experts(every_layer)) <= pool.room_bytes.sum()
    prices = _EXPERT_ROOM_PRICES if enough and any(demand.num_experts) else _EXPERT_ROOM_PRICES[:1]
    for price in prices:
        for route in best_routes(demand, pool, price_s=price * policy.hop_s):
            placement = _place_experts(demand, pool, route)
            if not placement.unplaced:
                return _topology(demand, pool, route, placement, epoch)
            tried.append(placement)
    raise _insufficient_capacity(demand, pool, tried)


def check_total_capacity(structure: Structure, nodes: Sequence[Node], policy: PlanPolicy) -> None:
    """Raise InsufficientCapacity (NEVER_FITS) with the bytes missing when a model exceeds idle nodes too.

    A suspect or paused node may come back and counts; a leaving one does not. When nothing is raised, waiting
    helps.
    """
    idle = [
        replace(node, vram_free_bytes=node.vram_total_bytes, state=NodeState.ALIVE)
        for node in nodes
        if node.state in (NodeState.ALIVE, NodeState.SUSPECT, NodeState.PAUSED)
    ]
    try:
        plan(structure, idle, policy)
    except InsufficientCapacity as error:
        raise InsufficientCapacity(
            error.message, code=NEVER_FITS, missing_bytes=error.missing_bytes
        ) from error


def check_kv_capacity(structure: Structure, topology: Topology, num_tokens: int) -> None:
    """Raise InvalidRequest with the bytes missing when one sequence of `num_tokens` exceeds the KV pool."""
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


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """The experts of a route: beside each stage's routers, and apart from their routers by node index.

    `unplaced` are the experts that found no room.
    """

    beside: tuple[ExpertIds, ...]
    apart: Mapping[int, ExpertIds]
    unplaced: ExpertIds


def _place_experts(demand: MemoryDemand, pool: NodePool, route: LayerRoute) -> ExpertPlacement:
    """Keep experts beside their routers as far as they fit; place the others on nodes that have room."""
    beside = tuple(_experts_beside(demand, span, int(pool.room_bytes[node])) for node, span in route.spans)
    room_bytes = pool.room_bytes.copy()
    for (node, span), kept in zip(route.spans, beside, strict=True):
        room_bytes[node] -= demand.stage_vram_bytes(span, kept)
    sets = _ExpertSets(demand, pool, room_bytes)
    unplaced: dict[int, tuple[int, ...]] = {}
    for (node, _), kept in zip(route.spans, beside, strict=True):
        for layer, ids in kept.items():
            others = tuple(range(len(ids), demand.num_experts[layer]))
            if rest := sets.place(layer, others, router=node):
                unplaced[layer] = rest
    return ExpertPlacement(beside, sets.by_node, unplaced)


def _experts_beside(demand: MemoryDemand, span: LayerSpan, room_bytes: int) -> ExpertIds:
    """Return the experts that stay: whole layers first, then the lowest ids of the first that does not fit.

    A layer with one expert apart waits for two frames, as a layer with all experts apart does: so as few
    layers as possible have experts apart.
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


class _ExpertSets:
    """The experts apart from their routers, in at most one set per node, and the room that is left."""

    def __init__(self, demand: MemoryDemand, pool: NodePool, room_bytes: NDArray[np.int64]) -> None:
        self._demand, self._pool, self._room_bytes = demand, pool, room_bytes
        self._overhead_bytes = np.full(len(room_bytes), demand.expert_set_overhead_bytes)
        self.by_node: dict[int, dict[int, tuple[int, ...]]] = {}

    def place(self, layer: int, experts: tuple[int, ...], router: int) -> tuple[int, ...]:
        """Place a layer's experts on as few nodes as possible; return the experts that found no room."""
        while experts:
            node, fitting = self._best_node(layer, len(experts), router)
            if not fitting:
                break
            self.by_node.setdefault(node, {})[layer] = experts[:fitting]
            self._room_bytes[node] -= self._overhead_bytes[node] + fitting * self._demand.expert_bytes[layer]
            self._overhead_bytes[node] = 0
            experts = experts[fitting:]
        return experts

    def _best_node(self, layer: int, wanted: int, router: int) -> tuple[int, int]:
        """Return the node that has room for the most experts of a layer, and their number.

        Ties go to the node that is nearer to the router, then to the faster node, then to the node with more
        of the layer on its disk, then to the lower id.
        """
        if not len(self._room_bytes):
            return 0, 0
        fitting = (self._room_bytes - self._overhead_bytes) // self._demand.expert_bytes[layer]
        fitting = np.clip(fitting, 0, wanted)
        fitting[router] = 0
        fitting[[node for node, experts in self.by_node.items() if layer in experts]] = 0
        links_s = self._pool.links_s
        nearness = np.zeros(len(fitting)) if links_s is None else links_s[router]
        cached = self._pool.cached_bytes[:, layer]
        ranked = np.lexsort((-cached, self._pool.seconds_per_byte, nearness, -fitting))
        return int(ranked[0]), int(fitting[ranked[0]])


def _topology(
    demand: MemoryDemand, pool: NodePool, route: LayerRoute, placement: ExpertPlacement, epoch: int
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
        for index, ((node, span), experts) in enumerate(zip(route.spans, placement.beside, strict=True))
    )
    expert_sets = tuple(
        ExpertSet(
            index=index,
            node_id=pool.nodes[node].node_id,
            experts=experts,
            vram_bytes=demand.expert_set_vram_bytes(experts),
        )
        for index, (node, experts) in enumerate(sorted(placement.apart.items()))
    )
    return Topology(
        model_id=structure.model_id,
        revision=structure.revision,
        epoch=epoch,
        stages=stages,
        expert_sets=expert_sets,
        num_blocks=policy.num_blocks,
        block_size=policy.block_size,
        prediction=predict_pieces(demand, pool.nodes, stages, expert_sets),
    )


def _insufficient_capacity(
    demand: MemoryDemand, pool: NodePool, tried: Sequence[ExpertPlacement]
) -> InsufficientCapacity:
    """Return the error: what a model needs, what the nodes have, and what further nodes would need.

    `tried` are placements on routes that found room for all layers but not for all experts.
    """
    structure, policy = demand.structure, demand.policy
    weights = sum(shard.weight_bytes for shard in structure.shards)
    tokens = policy.num_blocks * policy.block_size
    kv = sum(layer.kv_bytes_per_token for layer in structure.layers) * tokens
    layers, experts = _unplaced(demand, pool, tried)
    missing, what = 0, []
    if len(layers):
        missing += demand.stage_vram_bytes(layers, demand.all_experts(layers))
        what.append(f"layers {layers.start} to {layers.end - 1}")
    if experts:
        missing += demand.expert_set_vram_bytes(experts)
        what.append(f"{sum(map(len, experts.values()))} experts of layers {min(experts)} to {max(experts)}")
    needs = (
        f"{structure.model_id} needs {format_bytes(weights)} for weights, {format_bytes(kv)} for the KV of "
        f"{policy.promised_sequences} sequences of {policy.tokens_per_sequence} tokens and "
        f"{format_bytes(demand.expert_set_overhead_bytes)} for activations and margin on each node"
    )
    free = f"{len(pool.nodes)} live nodes have {format_bytes(int(pool.room_bytes.sum()))} free"
    return InsufficientCapacity(
        f"{needs}; {free}: {missing} bytes are missing on one more node for {' and '.join(what)}"
        if pool.nodes
        else f"{NO_WORKER} ({needs})",
        missing_bytes=tuple(_missing_bytes_by_node(demand, pool, layers, experts)),
    )


def _unplaced(
    demand: MemoryDemand, pool: NodePool, tried: Sequence[ExpertPlacement]
) -> tuple[LayerSpan, ExpertIds]:
    """Return the layers and the experts that found no room."""
    num_layers = demand.structure.num_layers
    if tried:
        unplaced = min((placement.unplaced for placement in tried), key=demand.experts_bytes)
        return LayerSpan(num_layers, num_layers), unplaced
    route = longest_route(demand, pool)
    placed = route.spans[-1][1].end if route.spans else 0
    return LayerSpan(placed, num_layers), _place_experts(demand, pool, route).unplaced


def _missing_bytes_by_node(
    demand: MemoryDemand, pool: NodePool, layers: LayerSpan, experts: ExpertIds
) -> Iterator[int]:
    """Yield the VRAM that each of several further nodes would have to lend.

    None is larger than the largest node in the pool, except where one layer alone needs more.
    """
    largest = max((node.vram_total_bytes for node in pool.nodes), default=0)
    start = layers.start
    for end in range(layers.start + 1, layers.end + 1):
        longer = LayerSpan(start, min(end + 1, layers.end))
        if end == layers.end or demand.stage_vram_bytes(longer, demand.all_experts(longer)) > largest:
            span = LayerSpan(start, end)
            yield demand.stage_vram_bytes(span, demand.all_experts(span))
            start = end
    for layer, ids in experts.items():
        yield demand.expert_set_vram_bytes({layer: ids})
