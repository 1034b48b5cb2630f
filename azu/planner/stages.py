"""Layers onto nodes: the fastest cut of the layers into spans, each within its node's memory."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from azu.planner.demand import Demand
from azu.protocol.node import Node
from azu.protocol.topology import LayerSpan

# Two routes this close in time are equal, and the one with more cached bytes wins.
_SAME_S = 1e-12


def fastest_spans(
    demand: Demand, nodes: Sequence[Node], span_bytes: NDArray[np.int64]
) -> list[tuple[Node, LayerSpan]] | None:
    """Return the spans of the route with the least time per token, or None when no route fits.

    Dynamic programming over nodes in a fixed order; each takes the next span or is left out. Leaving out is
    always allowed, so one more node never makes the best route slower. Time per token is a sum, the same in
    whatever order nodes follow each other, so that fixing the order costs next to nothing. Ties go to more
    cached bytes, then to the lower node id. O(nodes x layers^2), vectorised over layers.
    """
    num_layers = demand.structure.num_layers
    order = sorted(nodes, key=lambda node: node.node_id)
    seconds = np.full(num_layers + 1, np.inf)
    missing = np.zeros(num_layers + 1)
    seconds[0] = 0.0
    active = demand.active_sums[None, :] - demand.active_sums[:, None]
    choices: list[NDArray[np.int64]] = []
    for node in order:
        route_s, route_missing, start = _extend(demand, node, span_bytes, active, seconds, missing)
        better = (route_s < seconds - _SAME_S) | (
            (route_s <= seconds + _SAME_S) & (route_missing < missing) & np.isfinite(route_s)
        )
        seconds = np.where(better, route_s, seconds)
        missing = np.where(better, route_missing, missing)
        choices.append(np.where(better, start, -1))
    if not np.isfinite(seconds[num_layers]):
        return None
    return _walk_back(order, choices, num_layers)


def _extend(
    demand: Demand,
    node: Node,
    span_bytes: NDArray[np.int64],
    active: NDArray[np.int64],
    seconds: NDArray[np.float64],
    missing: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return, per end layer, the best route whose last span is on this node, and where that span starts."""
    num_layers = demand.structure.num_layers
    per_byte = demand.seconds_per_byte(node, demand.policy.batch_size)
    fits = (span_bytes <= node.vram_free_bytes) & (active > 0)
    total = np.where(fits, seconds[:, None] + active * per_byte + demand.policy.hop_s, np.inf)
    # The first stage is reached without a hop between workers.
    total[0] -= demand.policy.hop_s
    fetched = missing[:, None] + _missing_bytes(demand, node)
    best = total.min(axis=0)
    tied = np.where(total <= best + _SAME_S, fetched, np.inf)
    start = tied.argmin(axis=0)
    return total[start, np.arange(num_layers + 1)], tied.min(axis=0), start


def _missing_bytes(demand: Demand, node: Node) -> NDArray[np.float64]:
    """Return [start, end] -> bytes of the span's own shards that are not on the node's disk."""
    structure = demand.structure
    per_layer = [0]
    for layer in range(structure.num_layers):
        shard = structure.layer_shard(layer)
        per_layer.append(0 if shard.sha256 in node.cached_shards else shard.weight_bytes)
    sums = np.cumsum(per_layer, dtype=np.float64)
    return np.subtract(sums[None, :], sums[:, None])


def _walk_back(
    order: Sequence[Node], choices: Sequence[NDArray[np.int64]], num_layers: int
) -> list[tuple[Node, LayerSpan]]:
    spans: list[tuple[Node, LayerSpan]] = []
    end = num_layers
    for node, starts in zip(reversed(order), reversed(choices), strict=True):
        if end and (start := int(starts[end])) >= 0:
            spans.append((node, LayerSpan(start, end)))
            end = start
    assert end == 0, "every route begins at layer 0"
    return spans[::-1]
