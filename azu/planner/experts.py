"""Experts that do not fit beside their router, onto the nodes that have room."""

from collections.abc import Mapping, Sequence

from azu.planner.demand import Demand
from azu.protocol.node import Node
from azu.protocol.topology import LayerSpan

Experts = dict[int, tuple[int, ...]]


def experts_beside(demand: Demand, spans: Sequence[tuple[Node, LayerSpan]], beside: int) -> list[Experts]:
    """Return, per stage, the experts kept beside each router: those with the lowest ids."""
    return [
        {
            layer: tuple(range(min(beside, demand.num_experts[layer])))
            for layer in range(span.start, span.end)
            if demand.num_experts[layer]
        }
        for _, span in spans
    ]


def experts_apart(demand: Demand, beside: int, room: Mapping[str, int]) -> dict[str, Experts] | None:
    """Return node id -> experts held apart from their routers, or None when the room is too little.

    `room` is what the stages leave on each node. Each layer's experts are kept together as far as they
    fit: the emptiest node takes as many as it can, then the next.
    """
    held: dict[str, dict[int, tuple[int, ...]]] = {}
    for layer, count in enumerate(demand.num_experts):
        waiting = list(range(beside, count))
        while waiting:
            node_id, fitting = _roomiest(demand, layer, len(waiting), held, room)
            if not fitting:
                return None
            held.setdefault(node_id, {})[layer] = tuple(waiting[:fitting])
            waiting = waiting[fitting:]
    return held


def _roomiest(
    demand: Demand, layer: int, wanted: int, held: Mapping[str, Experts], room: Mapping[str, int]
) -> tuple[str, int]:
    """Return the node that can take the most experts of a layer, and how many; ties go to the lower id."""
    best = ("", 0)
    for node_id in sorted(room):
        counts = {held_layer: len(ids) for held_layer, ids in held.get(node_id, {}).items()}
        if layer in counts:
            continue
        fitting = _fitting(demand, layer, wanted, counts, room[node_id])
        if fitting > best[1]:
            best = (node_id, fitting)
        if best[1] == wanted:
            break
    return best


def _fitting(demand: Demand, layer: int, wanted: int, counts: Mapping[int, int], room: int) -> int:
    """Return how many experts of a layer a node takes beside those it holds."""
    low, high = 0, wanted
    while low < high:
        middle = (low + high + 1) // 2
        if demand.expert_set_bytes({**counts, layer: middle}) <= room:
            low = middle
        else:
            high = middle - 1
    return low
