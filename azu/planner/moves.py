"""What it costs to bring pieces up, and whether a better placement is worth it."""

from collections.abc import Sequence

from azu.planner.policy import PlanPolicy
from azu.planner.prediction import predict
from azu.planner.shards import shards_of
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Stage, Topology

Piece = Stage | ExpertSet


def cold_start_s(
    structure: Structure,
    topology: Topology,
    nodes: Sequence[Node],
    policy: PlanPolicy,
    *,
    current: Topology | None = None,
) -> float:
    """Return how long a topology takes to come up: nodes fetch what they lack, then load, side by side.

    Pieces that `current` has on the same node with the same content stay as they are.
    """
    cached = {node.node_id: node.cached_shards for node in nodes}
    standing = {_content(piece) for piece in current.pieces} if current else set()
    seconds: dict[str, float] = {}
    for piece in topology.pieces:
        if _content(piece) in standing:
            continue
        shards = list(shards_of(structure, piece))
        fetched = sum(one.size_bytes for one in shards if one.sha256 not in cached[piece.node_id])
        loaded = sum(one.weight_bytes for one in shards)
        took_s = fetched / policy.fetch_bytes_per_s + loaded / policy.load_bytes_per_s
        seconds[piece.node_id] = seconds.get(piece.node_id, 0.0) + took_s
    return max(seconds.values(), default=0.0)


def worth_moving(
    structure: Structure, current: Topology, candidate: Topology, nodes: Sequence[Node], policy: PlanPolicy
) -> bool:
    """Return whether a candidate makes more tokens in the policy's horizon than staying, moving included.

    Both are judged on the nodes as they are now; `nodes` must hold all that either uses. A gain below the
    policy's least one is none: measurements waver, and pieces must not wander with them.
    """
    stays = predict(structure, current, nodes, policy).tokens_per_s
    moves = predict(structure, candidate, nodes, policy).tokens_per_s
    # Counted as if nothing were served meanwhile: a stage that moves stops its whole pipeline.
    serving_s = policy.horizon_s - cold_start_s(structure, candidate, nodes, policy, current=current)
    return moves * serving_s > stays * policy.horizon_s * (1 + policy.least_gain)


def _content(piece: Piece) -> tuple[str, tuple[int, int] | None, tuple[tuple[int, tuple[int, ...]], ...]]:
    span = (piece.span.start, piece.span.end) if isinstance(piece, Stage) else None
    return piece.node_id, span, tuple(sorted(piece.experts.items()))
