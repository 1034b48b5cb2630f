"""Which shards a piece of a model is loaded from."""

from collections.abc import Iterator

from azu.protocol.structure import Shard, Structure
from azu.protocol.topology import ExpertSet, Stage


def shards_of(structure: Structure, piece: Stage | ExpertSet) -> Iterator[Shard]:
    """Yield the shards that a stage or an expert set needs on its node's disk."""
    if isinstance(piece, Stage):
        yield from structure.edge_shards(piece.span.start, piece.span.end)
        yield from (structure.layer_shard(layer) for layer in range(piece.span.start, piece.span.end))
    for layer, experts in piece.experts.items():
        yield from (structure.expert_shard(layer, expert) for expert in experts)
