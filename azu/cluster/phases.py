"""How far the start or the repair of a model is, as its jobs are told."""

from collections.abc import Mapping, Set

from azu.models.status import ModelState, ModelStatus
from azu.planner.demand import shards_of
from azu.protocol.node import Node
from azu.protocol.phase import JobPhase, fetching
from azu.protocol.structure import Structure
from azu.protocol.topology import PieceKey, Topology, key_of
from azu.units import format_bytes


def on_the_head(status: ModelStatus) -> JobPhase:
    """Return how far a model is before it has places on nodes."""
    done, total = status.done_bytes, status.total_bytes
    match status.state:
        case ModelState.FETCHING:
            return fetching(f"Downloading {status.model_id}", done, total)
        case ModelState.CUTTING:
            return fetching(f"Cutting {status.model_id} into shards", done, total)
        case ModelState.READY:
            return JobPhase("loading", f"Looking for room for {status.model_id}.")
        case _:
            return JobPhase("describing", f"Looking at the files of {status.model_id}.")


def on_nodes(
    structure: Structure,
    topology: Topology,
    nodes: Mapping[str, Node],
    loaded: Set[PieceKey],
    *,
    is_repair: bool,
) -> JobPhase:
    """Return how many shards are on their nodes, by these nodes' reports, or else how many pieces are up."""
    up, pieces = sum(key_of(piece) in loaded for piece in topology.pieces), len(topology.pieces)
    here, wanted = [], []
    for piece in topology.pieces:
        shards = list(shards_of(structure, piece))
        node = nodes.get(piece.node_id)
        cached = frozenset[str]() if node is None else node.cached_shards
        is_here = key_of(piece) in loaded
        here += [shard.size_bytes for shard in shards if is_here or shard.sha256 in cached]
        wanted += [shard.size_bytes for shard in shards]
    model = structure.model_id
    sizes = f"{len(here):,} of {len(wanted):,}, {format_bytes(sum(here))} of {format_bytes(sum(wanted))}"
    if is_repair:
        text = f"Recovering: {up} of {pieces} parts of {model} are up; shards on their nodes: {sizes}."
        return JobPhase("recovering", text, up, pieces, sum(here), sum(wanted))
    if len(here) < len(wanted):
        text = f"Fetching shards: {sizes}."
        return JobPhase("fetching", text, len(here), len(wanted), sum(here), sum(wanted))
    return JobPhase("loading", f"Loading {model}: {up} of {pieces} parts are up.", up, pieces)
