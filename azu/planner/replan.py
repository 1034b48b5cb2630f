"""A new place for the pieces that were lost; everything that survives stays where it is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from azu.errors import InsufficientCapacity
from azu.planner.demand import MemoryDemand, shards_of
from azu.planner.node_pool import seconds_per_byte
from azu.planner.policy import PlanPolicy
from azu.planner.prediction import predicted
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Shard, Structure
from azu.protocol.topology import ExpertSet, PieceSet, Stage, Topology
from azu.units import MIB, format_bytes

_Piece = TypeVar("_Piece", Stage, ExpertSet)


def replan(
    structure: Structure,
    topology: Topology,
    loss: PieceSet,
    nodes: Sequence[Node],
    policy: PlanPolicy,
    *,
    epoch: int,
) -> Topology:
    """Put the lost stages and expert sets, whole and under their old indices, on live nodes.

    The free bytes of `nodes` are those beside all that survives. Where the shards lie on disk goes first,
    then speed. A replica that is lost is left out. Raises InsufficientCapacity when a piece finds no node;
    the same input gives the same output.
    """
    assert epoch > topology.epoch, "an epoch never comes twice"
    topology, loss = topology.without(loss & topology.replicas), loss - topology.replicas
    rooms = _Rooms(structure, nodes, policy)
    # The largest first: what is left over is for the small ones.
    lost: list[Stage | ExpertSet] = [stage for stage in topology.stages if stage.index in loss.stages]
    lost += [chosen for chosen in topology.expert_sets if chosen.index in loss.expert_sets]
    for piece in sorted(lost, key=lambda one: -one.vram_bytes):
        rooms.take(piece)
    moved = replace(
        topology,
        epoch=epoch,
        stages=rooms.moved(topology.stages, loss.stages),
        expert_sets=rooms.moved(topology.expert_sets, loss.expert_sets),
    )
    if not set(moved.vram_bytes_by_node) <= {node.node_id for node in nodes}:
        return moved  # a node that was not heard of lately: nobody knows how fast it is
    demand = MemoryDemand.of(structure, policy)
    return replace(moved, prediction=predicted(demand, nodes, moved.stages, moved.expert_sets))


class _Rooms:
    """What is free on each live node, piece by piece."""

    def __init__(self, structure: Structure, nodes: Sequence[Node], policy: PlanPolicy) -> None:
        self._structure = structure
        self._nodes = sorted((n for n in nodes if n.state is NodeState.ALIVE), key=lambda n: n.node_id)
        demand = MemoryDemand.of(structure, policy)
        slowness = seconds_per_byte(self._nodes, demand, policy.batch_size).tolist()
        self._slowness = dict(zip((node.node_id for node in self._nodes), slowness, strict=True))
        self._free = {node.node_id: node.vram_free_bytes // MIB * MIB for node in self._nodes}
        self._taken: dict[tuple[type, int], str] = {}

    def take(self, piece: Stage | ExpertSet) -> None:
        """Give a piece the best node that has room for it."""
        fitting = [node for node in self._nodes if self._free[node.node_id] >= piece.vram_bytes]
        if not fitting:
            what = "stage" if isinstance(piece, Stage) else "expert set"
            most = max(self._free.values(), default=0)
            raise InsufficientCapacity(
                f"{what} {piece.index} of {self._structure.model_id} was lost and needs "
                f"{format_bytes(piece.vram_bytes)}; of {len(self._nodes)} live nodes none has more than "
                f"{format_bytes(most)} free: {piece.vram_bytes - most} bytes are missing"
            )
        shards = list(shards_of(self._structure, piece))
        best = min(fitting, key=lambda node: (_missing_bytes(node, shards), self._slowness[node.node_id]))
        self._free[best.node_id] -= piece.vram_bytes
        self._taken[type(piece), piece.index] = best.node_id

    def moved(self, pieces: tuple[_Piece, ...], lost: frozenset[int]) -> tuple[_Piece, ...]:
        """Return pieces with the lost ones on their new nodes."""
        return tuple(
            replace(one, node_id=self._taken[type(one), one.index]) if one.index in lost else one
            for one in pieces
        )


def _missing_bytes(node: Node, shards: Sequence[Shard]) -> int:
    return sum(shard.size_bytes for shard in shards if shard.sha256 not in node.cached_shards)
