"""Why a model finds no room: how many bytes are missing, and for what."""

from collections.abc import Iterator, Sequence

from azu.errors import InsufficientCapacity
from azu.planner.demand import Demand
from azu.planner.experts import Experts, Spread, spread_experts
from azu.planner.pool import Pool
from azu.planner.stages import longest_route
from azu.protocol.topology import LayerSpan
from azu.units import format_bytes


def shortage(demand: Demand, pool: Pool, tried: Sequence[Spread]) -> InsufficientCapacity:
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


def _left_over(demand: Demand, pool: Pool, tried: Sequence[Spread]) -> tuple[LayerSpan, Experts]:
    """Return the layers and the experts that found no room."""
    num_layers = demand.structure.num_layers
    if tried:
        homeless = min((spread.homeless for spread in tried), key=demand.experts_bytes)
        return LayerSpan(num_layers, num_layers), homeless
    route = longest_route(demand, pool)
    placed = route.spans[-1][1].end if route.spans else 0
    return LayerSpan(placed, num_layers), spread_experts(demand, pool, route).homeless


def _by_node(demand: Demand, pool: Pool, rest: LayerSpan, homeless: Experts) -> Iterator[int]:
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
