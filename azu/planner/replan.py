"""Place lost pieces again; the pieces that survive stay where they are."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from azu.errors import InsufficientCapacity
from azu.planner.demand import MemoryDemand, shards_of
from azu.planner.node_pool import seconds_per_byte
from azu.planner.policy import PlanPolicy
from azu.planner.prediction import predict_pieces
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Shard, Structure
from azu.protocol.topology import ExpertSet, Piece, PieceSet, Stage, Topology
from azu.units import MIB, format_bytes

_PieceT = TypeVar("_PieceT", Stage, ExpertSet)


def replan(
    structure: Structure,
    topology: Topology,
    loss: PieceSet,
    nodes: Sequence[Node],
    policy: PlanPolicy,
    *,
    epoch: int,
    avoided: Collection[str] = (),
) -> Topology:
    """Place each lost stage and expert set, as one piece and under its old index, on a live node.

    The free bytes of `nodes` are those beside all surviving pieces. A node that is not `avoided` comes first,
    then one with more of the shards on its disk, a faster one, one with more room. A lost replica is left
    out. Raises InsufficientCapacity when a piece finds no node; the same input gives the same topology.
    """
    assert epoch > topology.epoch, "each topology of a model has a new epoch"
    topology, loss = topology.without(loss & topology.replicas), loss - topology.replicas
    demand = MemoryDemand.of(structure, policy)
    free = _FreeRoom(demand, nodes)
    lost: list[Piece] = [stage for stage in topology.stages if stage.index in loss.stages]
    lost += [chosen for chosen in topology.expert_sets if chosen.index in loss.expert_sets]
    # The largest piece comes first: small ones fit into the room that is left.
    for piece in sorted(lost, key=lambda one: -one.vram_bytes):
        free.place(piece, avoided)
    moved = replace(
        topology,
        epoch=epoch,
        stages=free.moved(topology.stages, loss.stages),
        expert_sets=free.moved(topology.expert_sets, loss.expert_sets),
    )
    if not set(moved.vram_bytes_by_node) <= {node.node_id for node in nodes}:
        return moved  # a node without a report: its speed is unknown
    return replace(moved, prediction=predict_pieces(demand, nodes, moved.stages, moved.expert_sets))


class _FreeRoom:
    """The free room on each live node, and the nodes of the pieces placed so far."""

    def __init__(self, demand: MemoryDemand, nodes: Sequence[Node]) -> None:
        self._structure = demand.structure
        self._nodes = sorted((n for n in nodes if n.state is NodeState.ALIVE), key=lambda n: n.node_id)
        slowness = seconds_per_byte(self._nodes, demand, demand.policy.batch_size).tolist()
        self._slowness = dict(zip((node.node_id for node in self._nodes), slowness, strict=True))
        self._free = {node.node_id: node.vram_free_bytes // MIB * MIB for node in self._nodes}
        self._placed: dict[tuple[type, int], str] = {}

    def place(self, piece: Piece, avoided: Collection[str]) -> None:
        """Place a piece on the best node that has room for it."""
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

        def order(node: Node) -> tuple[bool, int, float, int]:
            node_id = node.node_id
            slowness = self._slowness[node_id]
            return node_id in avoided, _missing_bytes(node, shards), slowness, -self._free[node_id]

        best = min(fitting, key=order)
        self._free[best.node_id] -= piece.vram_bytes
        self._placed[type(piece), piece.index] = best.node_id

    def moved(self, pieces: tuple[_PieceT, ...], lost: frozenset[int]) -> tuple[_PieceT, ...]:
        """Return the pieces with the lost ones on their new nodes."""
        return tuple(
            replace(one, node_id=self._placed[type(one), one.index]) if one.index in lost else one
            for one in pieces
        )


def _missing_bytes(node: Node, shards: Sequence[Shard]) -> int:
    return sum(shard.size_bytes for shard in shards if shard.sha256 not in node.cached_shards)
