"""The planner: a model's structure and the live nodes in, a topology or a clear "no" out."""

from collections.abc import Sequence

from azu.errors import InvalidRequest
from azu.planner.demand import Demand
from azu.planner.experts import Spread, spread_experts
from azu.planner.policy import PlanPolicy
from azu.planner.pool import Pool
from azu.planner.prediction import predicted
from azu.planner.search import Route
from azu.planner.shortage import shortage
from azu.planner.stages import best_routes
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, LayerSpan, Stage, Topology

# What a place for one expert is worth, in frames.
_ROOM_PRICES = (0.0, 0.25, 1.0, 4.0, 1e6)


def plan(structure: Structure, nodes: Sequence[Node], policy: PlanPolicy, *, epoch: int = 1) -> Topology:
    """Place a model's layers and experts on live nodes, for the least time per token.

    The same input gives the same output, in whatever order the nodes come. Raises InsufficientCapacity that
    says how many bytes are missing and for what.
    """
    if not structure.layers:
        raise InvalidRequest(f"{structure.model_id} has no layers")
    demand = Demand.of(structure, policy)
    pool = Pool.of(nodes, demand)
    tried: list[Spread] = []
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


def _topology(demand: Demand, pool: Pool, route: Route, spread: Spread, epoch: int) -> Topology:
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
