"""Why a model finds no room: how many bytes are missing, and for what."""

from collections.abc import Sequence

from azu.planner.demand import Demand
from azu.planner.experts import Spread, spread_experts
from azu.planner.pool import Pool
from azu.planner.stages import longest_route
from azu.protocol.topology import LayerSpan
from azu.units import format_bytes


def shortage(demand: Demand, pool: Pool, tried: Sequence[Spread]) -> str:
    """Say what a model needs, what there is, and what one more node would have to have.

    `tried` are routes whose layers found room but whose experts did not.
    """
    structure, policy = demand.structure, demand.policy
    weights = sum(shard.weight_bytes for shard in structure.shards)
    tokens = policy.num_blocks * policy.block_size
    kv = sum(layer.kv_bytes_per_token for layer in structure.layers) * tokens
    missing, what = _missing(demand, pool, tried)
    return (
        f"{structure.model_id} needs {format_bytes(weights)} for weights, {format_bytes(kv)} for the KV of "
        f"{policy.promised_sequences} sequences of {policy.tokens_per_sequence} tokens and "
        f"{format_bytes(demand.expert_set_overhead_bytes)} for activations and margin on each node; "
        f"{len(pool.nodes)} live nodes have {format_bytes(int(pool.room_bytes.sum()))} free: "
        f"{missing} bytes are missing on one more node for {' and '.join(what)}"
    )


def _missing(demand: Demand, pool: Pool, tried: Sequence[Spread]) -> tuple[int, list[str]]:
    num_layers = demand.structure.num_layers
    if tried:
        rest = LayerSpan(num_layers, num_layers)
        homeless = min((spread.homeless for spread in tried), key=demand.experts_bytes)
    else:
        route = longest_route(demand, pool)
        rest = LayerSpan(route.spans[-1][1].end if route.spans else 0, num_layers)
        homeless = spread_experts(demand, pool, route).homeless
    missing, what = 0, []
    if len(rest):
        missing += demand.stage_vram_bytes(rest, demand.all_experts(rest))
        what.append(f"layers {rest.start} to {rest.end - 1}")
    if homeless:
        missing += demand.expert_set_vram_bytes(homeless)
        what.append(
            f"{sum(map(len, homeless.values()))} experts of layers {min(homeless)} to {max(homeless)}"
        )
    return missing, what
