"""The planner: a model's structure and the live nodes in, a topology or a clear "no" out."""

from collections.abc import Sequence

from azu.errors import InsufficientCapacity, InvalidRequest
from azu.planner.demand import Demand
from azu.planner.experts import Experts, experts_apart, experts_beside
from azu.planner.policy import PlanPolicy
from azu.planner.stages import fastest_spans
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, LayerSpan, Prediction, Stage, Topology
from azu.units import format_bytes

Route = list[tuple[Node, LayerSpan]]


def plan(structure: Structure, nodes: Sequence[Node], policy: PlanPolicy, *, epoch: int = 1) -> Topology:
    """Place a model's layers and experts on live nodes, for the least time per token.

    The same input gives the same output, in whatever order the nodes come. Raises InsufficientCapacity that
    says how many bytes are missing and for what.
    """
    if not structure.layers:
        raise InvalidRequest(f"{structure.model_id} has no layers")
    demand = Demand.of(structure, policy)
    alive = [node for node in nodes if node.state is NodeState.ALIVE]
    for beside in _numbers_beside(max(demand.num_experts)):
        span_bytes = demand.span_bytes(beside)
        route = fastest_spans(demand, alive, span_bytes)
        if route is None:
            continue
        room = {node.node_id: node.vram_free_bytes for node in alive}
        for node, span in route:
            room[node.node_id] -= int(span_bytes[span.start, span.end])
        apart = experts_apart(demand, beside, room)
        if apart is not None:
            return _topology(demand, route, beside, apart, epoch)
    raise InsufficientCapacity(_missing(demand, alive))


def _numbers_beside(most: int) -> list[int]:
    """Return how many experts to keep beside each router, from all of them down to none by halves."""
    numbers = [most]
    while numbers[-1]:
        numbers.append(numbers[-1] // 2)
    return numbers


def _topology(demand: Demand, route: Route, beside: int, apart: dict[str, Experts], epoch: int) -> Topology:
    structure, policy = demand.structure, demand.policy
    span_bytes = demand.span_bytes(beside)
    local = experts_beside(demand, route, beside)
    stages = tuple(
        Stage(
            index=index,
            node_id=node.node_id,
            span=span,
            experts=experts,
            vram_bytes=int(span_bytes[span.start, span.end]),
        )
        for index, ((node, span), experts) in enumerate(zip(route, local, strict=True))
    )
    expert_sets = tuple(
        ExpertSet(
            index=index,
            node_id=node_id,
            experts=experts,
            vram_bytes=demand.expert_set_bytes({layer: len(ids) for layer, ids in experts.items()}),
        )
        for index, (node_id, experts) in enumerate(sorted(apart.items()))
    )
    return Topology(
        model_id=structure.model_id,
        revision=structure.revision,
        epoch=epoch,
        stages=stages,
        expert_sets=expert_sets,
        num_blocks=policy.num_blocks,
        block_size=policy.block_size,
        prediction=_prediction(demand, route, apart),
    )


def _prediction(demand: Demand, route: Route, apart: dict[str, Experts]) -> Prediction:
    policy = demand.policy
    spread_layers = {layer for experts in apart.values() for layer in experts}
    # A router asks its experts and waits for them: two frames.
    hops = len(route) - 1 + 2 * len(spread_layers)

    def step_s(batch_size: int) -> float:
        return hops * policy.hop_s + sum(
            float(demand.active_sums[span.end] - demand.active_sums[span.start])
            * demand.seconds_per_byte(node, batch_size)
            for node, span in route
        )

    return Prediction(
        tokens_per_s=policy.batch_size / step_s(policy.batch_size),
        time_per_output_token_s=step_s(1),
        lamports_per_token=policy.lamports_per_token_layer * demand.structure.num_layers,
    )


def _missing(demand: Demand, alive: Sequence[Node]) -> str:
    """Say how many bytes are missing, and for what."""
    structure, policy = demand.structure, demand.policy
    experts = sum(n * size for n, size in zip(demand.num_experts, demand.expert_bytes, strict=True))
    weights = int(demand.weight_sums[-1]) + experts + demand.embed_bytes + demand.head_bytes
    if structure.tied_head:
        weights -= demand.embed_bytes
    kv = int(demand.kv_sums[-1])
    rest = int(weights * policy.margin_fraction) + policy.margin_bytes + demand.activation_bytes
    needed, free = weights + kv + rest, sum(node.vram_free_bytes for node in alive)
    what = (
        f"{structure.model_id} needs {format_bytes(weights)} for weights, {format_bytes(kv)} for the KV of "
        f"{policy.promised_sequences} sequences of {policy.tokens_per_sequence} tokens and "
        f"{format_bytes(rest)} for activations and margin on each node; "
        f"{len(alive)} live nodes have {format_bytes(free)} free"
    )
    if needed > free:
        return f"{what}: {needed - free} bytes are missing"
    largest = max(node.vram_free_bytes for node in alive)
    smallest_stage = int(demand.span_bytes(0).diagonal(1).max())
    short = max(0, smallest_stage - largest)
    detail = f"{short} bytes are missing on the largest node for its largest layer" if short else (
        "together that is enough, but it cannot be divided into pieces that fit"
    )  # fmt: skip
    return f"{what}: {detail}"
