"""How many KV blocks each pipeline may have when its nodes lose or regain room."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import PipelineKey, Stage, Topology

Deployed = tuple[Structure, Topology]


@dataclass(frozen=True, slots=True)
class KvReduction:
    """A pipeline has to shrink its KV pool to `num_blocks` on every stage: the stages share one block table.

    `missing_bytes` is what one of its nodes still lacks after that: pieces have to move away.
    """

    pipeline: PipelineKey
    num_blocks: int
    missing_bytes: int


def kv_reductions(
    deployed: Sequence[Deployed], reports: Iterable[Node], *, least_blocks: int
) -> tuple[KvReduction, ...]:
    """Return which pipelines have to give up KV so that the pieces of each node fit into its room.

    `reports` are the nodes as they report themselves. Each pipeline keeps `least_blocks`. Pipelines on one
    node give in proportion to the KV that they could give. The same input gives the same result; it is empty
    when everything fits.
    """
    kept = [topology.num_blocks for _, topology in deployed]
    missing = [0] * len(deployed)
    for node in reports:
        used = [topology.vram_bytes_by_node.get(node.node_id, 0) for _, topology in deployed]
        excess = -node.room_bytes(sum(used))
        if excess <= 0 or not any(used):
            continue
        block_bytes = [_block_bytes(structure, topology, node.node_id) for structure, topology in deployed]
        givable = [
            max(0, topology.num_blocks - least_blocks) * size
            for (_, topology), size in zip(deployed, block_bytes, strict=True)
        ]
        total = sum(givable)
        for index, (_, topology) in enumerate(deployed):
            if givable[index]:
                share = -(-min(excess, total) * givable[index] // total)
                kept[index] = min(kept[index], topology.num_blocks - -(-share // block_bytes[index]))
            if used[index]:
                missing[index] = max(missing[index], excess - total)
    return tuple(
        KvReduction(topology.key, num_blocks, lacking)
        for (_, topology), num_blocks, lacking in zip(deployed, kept, missing, strict=True)
        if num_blocks < topology.num_blocks or lacking
    )


def restored_num_blocks(
    deployed: Sequence[Deployed], reports: Iterable[Node], *, planned_blocks: int
) -> tuple[int, ...]:
    """Return how many blocks each pipeline may have, up to `planned_blocks`, where its nodes have room again.

    A pipeline that would get less than a quarter of `planned_blocks`, and not all that it lacks, keeps what
    it has: that is not worth a change. Pipelines that lack blocks share a node's room evenly.
    """
    lacking = [planned_blocks - topology.num_blocks for _, topology in deployed]
    used = [topology.vram_bytes_by_node for _, topology in deployed]
    spare: dict[str, int] = {}  # bytes for each pipeline that lacks blocks on the node
    for node in reports:
        sharing = [lacks > 0 and node.node_id in here for lacks, here in zip(lacking, used, strict=True)]
        room = node.room_bytes(sum(here.get(node.node_id, 0) for here in used))
        spare[node.node_id] = max(0, room) // max(1, sum(sharing))
    blocks = []
    for (structure, topology), lacks in zip(deployed, lacking, strict=True):
        more = lacks
        for node_id in {stage.node_id for stage in topology.stages}:
            more = min(more, spare.get(node_id, 0) // _block_bytes(structure, topology, node_id))
        is_worth_it = more == lacks or more >= planned_blocks // 4
        blocks.append(topology.num_blocks + (more if is_worth_it else 0))
    return tuple(blocks)


def with_blocks(structure: Structure, topology: Topology, num_blocks: int) -> Topology:
    """Return a topology whose stages hold another number of KV blocks, and take VRAM accordingly."""

    def resized(stage: Stage) -> Stage:
        more_bytes = (num_blocks - topology.num_blocks) * _stage_block_bytes(structure, topology, stage)
        return replace(stage, vram_bytes=stage.vram_bytes + more_bytes)

    return replace(topology, num_blocks=num_blocks, stages=tuple(map(resized, topology.stages)))


def _block_bytes(structure: Structure, topology: Topology, node_id: str) -> int:
    """Return the size of one KV block in all stages that a pipeline has on a node."""
    stages = [stage for stage in topology.stages if stage.node_id == node_id]
    return sum(_stage_block_bytes(structure, topology, stage) for stage in stages)


def _stage_block_bytes(structure: Structure, topology: Topology, stage: Stage) -> int:
    layers = structure.layers[stage.span.start : stage.span.end]
    return topology.block_size * sum(layer.kv_bytes_per_token for layer in layers)
