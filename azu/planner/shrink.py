"""What a node that lost room has to give back: KV blocks first, pieces only when those are not enough."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology


@dataclass(frozen=True, slots=True)
class Placed:
    """A model that is up. `least_blocks` is the KV that it keeps whatever happens: one sequence's."""

    structure: Structure
    topology: Topology
    least_blocks: int


@dataclass(frozen=True, slots=True)
class ShrinkOrder:
    """A model's KV pool has to shrink to `num_blocks`, on every stage, for they share one block table.

    `missing_bytes` is what a node of it still lacks after that: layers have to move away.
    """

    model_id: str
    revision: str
    num_blocks: int
    missing_bytes: int


def shrink_orders(placed: Sequence[Placed], reports: Iterable[Node]) -> tuple[ShrinkOrder, ...]:
    """Return which models have to give up KV so that every node's pieces fit into what it has now.

    `reports` are the nodes as they report themselves. Models on one node give in proportion to the KV that
    they could give. The same state gives the same orders; none when everything fits.
    """
    kept = [one.topology.num_blocks for one in placed]
    missing = [0] * len(placed)
    for node in reports:
        used = [one.topology.vram_bytes_by_node.get(node.node_id, 0) for one in placed]
        excess = -node.room_bytes(sum(used))
        if excess <= 0 or not any(used):
            continue
        givable = [_givable_bytes(one, node.node_id) for one in placed]
        total = sum(givable)
        for index, one in enumerate(placed):
            if givable[index]:
                share = -(-min(excess, total) * givable[index] // total)
                blocks = -(-share // _block_bytes(one, node.node_id))
                kept[index] = min(kept[index], one.topology.num_blocks - blocks)
            if used[index]:
                missing[index] = max(missing[index], excess - total)
    return tuple(
        ShrinkOrder(one.topology.model_id, one.topology.revision, num_blocks, lacking)
        for one, num_blocks, lacking in zip(placed, kept, missing, strict=True)
        if num_blocks < one.topology.num_blocks or lacking
    )


def _givable_bytes(placed: Placed, node_id: str) -> int:
    spare_blocks = max(0, placed.topology.num_blocks - placed.least_blocks)
    return spare_blocks * _block_bytes(placed, node_id)


def _block_bytes(placed: Placed, node_id: str) -> int:
    """Return what one block of KV takes in the model's stages on a node."""
    layers = [
        placed.structure.layers[layer]
        for stage in placed.topology.stages
        if stage.node_id == node_id
        for layer in range(stage.span.start, stage.span.end)
    ]
    return placed.topology.block_size * sum(layer.kv_bytes_per_token for layer in layers)
