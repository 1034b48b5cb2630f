"""What a node that lost room has to give back: KV blocks first, pieces only when those are not enough."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import PipelineKey, Stage, Topology


@dataclass(frozen=True, slots=True)
class Placed:
    """A model that is up.

    `least_blocks` is the KV that it keeps whatever happens: one sequence's; `most_blocks` what it was planned
    with.
    """

    structure: Structure
    topology: Topology
    least_blocks: int
    most_blocks: int


@dataclass(frozen=True, slots=True)
class KvReduction:
    """A model's KV pool has to shrink to `num_blocks`, on every stage, for they share one block table.

    `missing_bytes` is what a node of it still lacks after that: layers have to move away.
    """

    model_id: str
    revision: str
    num_blocks: int
    missing_bytes: int
    replica: int = 0

    @property
    def key(self) -> PipelineKey:
        """Which pipeline it is for."""
        return self.model_id, self.revision, self.replica


def shrink_orders(placed: Sequence[Placed], reports: Iterable[Node]) -> tuple[KvReduction, ...]:
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
        KvReduction(one.topology.model_id, one.topology.revision, num_blocks, lacking, one.topology.replica)
        for one, num_blocks, lacking in zip(placed, kept, missing, strict=True)
        if num_blocks < one.topology.num_blocks or lacking
    )


def blocks_again(placed: Sequence[Placed], reports: Iterable[Node]) -> tuple[int, ...]:
    """Return how many blocks each model may have, when nodes have room for more of what it was planned with.

    Less than a quarter of that is not worth a change. Models that lack blocks share a node's room evenly.
    """
    lacking = [one.most_blocks - one.topology.num_blocks for one in placed]
    nodes = {node.node_id: node for node in reports}
    spare = {
        node_id: node.room_bytes(sum(one.topology.vram_bytes_by_node.get(node_id, 0) for one in placed))
        for node_id, node in nodes.items()
    }
    sharing = {
        node_id: sum(
            lacks > 0 and node_id in one.topology.vram_bytes_by_node
            for one, lacks in zip(placed, lacking, strict=True)
        )
        for node_id in nodes
    }
    blocks = []
    for one, lacks in zip(placed, lacking, strict=True):
        more = lacks
        for node_id in {stage.node_id for stage in one.topology.stages}:
            room = max(0, spare.get(node_id, 0)) // max(1, sharing.get(node_id, 1))
            more = min(more, room // _block_bytes(one, node_id))
        enough = more == lacks or more >= one.most_blocks // 4
        blocks.append(one.topology.num_blocks + (more if enough else 0))
    return tuple(blocks)


def with_blocks(structure: Structure, topology: Topology, num_blocks: int) -> Topology:
    """Return a topology whose stages hold another number of KV blocks, with what they take then."""

    def resized(stage: Stage) -> Stage:
        more_bytes = (num_blocks - topology.num_blocks) * _block_bytes_of(structure, topology, (stage,))
        return replace(stage, vram_bytes=stage.vram_bytes + more_bytes)

    return replace(topology, num_blocks=num_blocks, stages=tuple(map(resized, topology.stages)))


def _givable_bytes(placed: Placed, node_id: str) -> int:
    spare_blocks = max(0, placed.topology.num_blocks - placed.least_blocks)
    return spare_blocks * _block_bytes(placed, node_id)


def _block_bytes(placed: Placed, node_id: str) -> int:
    """Return what one block of KV takes in the model's stages on a node."""
    stages = [stage for stage in placed.topology.stages if stage.node_id == node_id]
    return _block_bytes_of(placed.structure, placed.topology, stages)


def _block_bytes_of(structure: Structure, topology: Topology, stages: Iterable[Stage]) -> int:
    layers = [
        structure.layers[layer] for stage in stages for layer in range(stage.span.start, stage.span.end)
    ]
    return topology.block_size * sum(layer.kv_bytes_per_token for layer in layers)
