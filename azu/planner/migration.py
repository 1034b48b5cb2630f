"""Decide whether a better placement is worth the cost of moving pieces, and what would change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from azu.errors import InsufficientCapacity
from azu.planner.demand import shards_of
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.planner.prediction import predict
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Piece, PieceSet, Stage, Topology


@dataclass(frozen=True, slots=True)
class TopologyChange:
    """The change from one topology to another; pieces that both have stay as they are.

    `gone` are the pieces that only the old topology has, by its indices; `fresh` are those that only the new
    one has and that have to start.
    """

    topology: Topology
    gone: PieceSet
    fresh: PieceSet

    @property
    def fresh_bytes(self) -> dict[str, int]:
        """VRAM of the fresh pieces by node."""
        return self.topology.vram_bytes_of(self.fresh)


def better_placement(
    structure: Structure, current: Topology, nodes: Sequence[Node], policy: PlanPolicy
) -> TopologyChange | None:
    """Return the change to a placement that is worth moving to, or None.

    The free bytes of `nodes` are those without `current`.
    """
    if not current.vram_bytes_by_node.keys() <= {node.node_id for node in nodes}:
        return None  # a node without a report: its pieces are about to be placed again
    try:
        candidate = plan(structure, nodes, policy, epoch=current.epoch + 1)
    except InsufficientCapacity:
        return None
    candidate = replace(candidate, replica=current.replica)
    if not is_worth_moving(structure, current, candidate, nodes, policy):
        return None
    return change_between(current, candidate)


def change_between(current: Topology, candidate: Topology) -> TopologyChange:
    """Return the change between two topologies: a piece with the same content on the same node stays.

    A stage stays only at the same index. Expert sets that stay keep their indices, so that their routers need
    no new ones.
    """
    candidate = replace(candidate, expert_sets=_renumbered(current, candidate))
    return TopologyChange(candidate, gone=_not_in(candidate, current), fresh=_not_in(current, candidate))


def have_room(needed_bytes: Mapping[str, int], nodes: Sequence[Node]) -> bool:
    """Return whether live nodes have the bytes that are needed on each, by node id."""
    free = {node.node_id: node.vram_free_bytes for node in nodes if node.state is NodeState.ALIVE}
    return all(needed <= free.get(node_id, -1) for node_id, needed in needed_bytes.items())


def cold_start_s(
    structure: Structure,
    topology: Topology,
    nodes: Sequence[Node],
    policy: PlanPolicy,
    *,
    current: Topology | None = None,
) -> float:
    """Return the seconds that a topology takes to start: each node fetches missing shards, then loads.

    Nodes work in parallel. Pieces that `current` has on the same node with the same content stay.
    """
    cached = {node.node_id: node.cached_shards for node in nodes}
    staying = {_content(piece) for piece in current.pieces} if current else set()
    seconds: dict[str, float] = {}
    for piece in topology.pieces:
        if _content(piece) in staying:
            continue
        shards = list(shards_of(structure, piece))
        fetched = sum(one.size_bytes for one in shards if one.sha256 not in cached[piece.node_id])
        loaded = sum(one.weight_bytes for one in shards)
        took_s = fetched / policy.fetch_bytes_per_s + loaded / policy.load_bytes_per_s
        seconds[piece.node_id] = seconds.get(piece.node_id, 0.0) + took_s
    return max(seconds.values(), default=0.0)


def is_worth_moving(
    structure: Structure, current: Topology, candidate: Topology, nodes: Sequence[Node], policy: PlanPolicy
) -> bool:
    """Return whether a candidate makes more tokens in the policy's horizon than staying, moving included.

    Both are predicted on the nodes as they are now; `nodes` must hold each node that either uses. A gain
    below the policy's `least_gain` does not count: measurements vary, and pieces must not move with them.
    """
    stays = predict(structure, current, nodes, policy).tokens_per_s
    moves = predict(structure, candidate, nodes, policy).tokens_per_s
    # A stage that moves stops its whole pipeline, so nothing is served meanwhile.
    serving_s = policy.horizon_s - cold_start_s(structure, candidate, nodes, policy, current=current)
    return moves * serving_s > stays * policy.horizon_s * (1 + policy.least_gain)


def _not_in(other: Topology, topology: Topology) -> PieceSet:
    """Return the pieces of `topology` that `other` does not have."""
    there = {(piece.index, _content(piece)) for piece in other.pieces}
    missing = [piece for piece in topology.pieces if (piece.index, _content(piece)) not in there]
    return PieceSet(
        frozenset(piece.index for piece in missing if isinstance(piece, Stage)),
        frozenset(piece.index for piece in missing if isinstance(piece, ExpertSet)),
    )


def _renumbered(current: Topology, candidate: Topology) -> tuple[ExpertSet, ...]:
    before = {_content(chosen): chosen.index for chosen in current.expert_sets}
    kept = {before[_content(chosen)] for chosen in candidate.expert_sets if _content(chosen) in before}
    free = (index for index in count() if index not in kept)
    return tuple(
        replace(chosen, index=before[_content(chosen)] if _content(chosen) in before else next(free))
        for chosen in candidate.expert_sets
    )


def _content(piece: Piece) -> tuple[str, tuple[int, int] | None, tuple[tuple[int, tuple[int, ...]], ...]]:
    span = (piece.span.start, piece.span.end) if isinstance(piece, Stage) else None
    return piece.node_id, span, tuple(sorted(piece.experts.items()))
