"""The live nodes, as arrays in the order of their ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from azu.planner.demand import Demand
from azu.planner.links import link_matrix, rounded
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import EMBED, Shard, Structure
from azu.units import MIB


@dataclass(frozen=True, slots=True)
class Pool:
    """Nodes that take new pieces.

    `room_bytes` is free VRAM in whole MiB, as Ray hands it out. `seconds_per_byte` is a node's time per
    weight byte that a token touches: read once a step, multiplied once per sequence.
    `cached_bytes[node, layer]` counts what of a layer is on the node's disk. `links_s[node, other]` is the
    time of a frame between two, at least the policy's hop; None when no link was measured.
    """

    nodes: tuple[Node, ...]
    room_bytes: NDArray[np.int64]
    seconds_per_byte: NDArray[np.float64]
    cached_bytes: NDArray[np.int64]
    links_s: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, nodes: Sequence[Node], demand: Demand) -> "Pool":
        """Take the live ones of some nodes, in whatever order they come."""
        alive = tuple(sorted((n for n in nodes if n.state is NodeState.ALIVE), key=lambda n: n.node_id))
        return cls(
            nodes=alive,
            room_bytes=np.array([node.vram_free_bytes // MIB * MIB for node in alive], np.int64),
            seconds_per_byte=seconds_per_byte(alive, demand, demand.policy.batch_size),
            cached_bytes=_cached_bytes(alive, demand.structure),
            links_s=link_matrix(alive, demand.policy.hop_s),
        )


def seconds_per_byte(nodes: Sequence[Node], demand: Demand, batch_size: int) -> NDArray[np.float64]:
    """Return each node's time per weight byte touched, at a batch of `batch_size` sequences."""
    flops_per_byte = 2 * batch_size / demand.structure.dtype_bytes
    return np.array(
        [1 / rounded(node.memory_bytes_per_s) + flops_per_byte / rounded(node.flops_per_s) for node in nodes],
        np.float64,
    )


def _cached_bytes(nodes: Sequence[Node], structure: Structure) -> NDArray[np.int64]:
    cached = np.zeros((len(nodes), structure.num_layers), np.int64)
    by_hash = _layers_by_hash(structure)
    for index, node in enumerate(nodes):
        for sha256 in by_hash.keys() & node.cached_shards:
            layer, shard = by_hash[sha256]
            cached[index, layer] += shard.weight_bytes
    return cached


def _layers_by_hash(structure: Structure) -> Mapping[str, tuple[int, Shard]]:
    """Return hash -> (layer, shard); the embedding counts to the first layer, the head to the last."""
    last = structure.num_layers - 1
    found = {structure.shard(EMBED).sha256: (0, structure.shard(EMBED))}
    found |= {shard.sha256: (last, shard) for shard in structure.edge_shards(last + 1, last + 1)}
    for layer in structure.layers:
        shards = [structure.layer_shard(layer.index)]
        shards += [structure.expert_shard(layer.index, e) for e in range(layer.num_experts)]
        found |= {shard.sha256: (layer.index, shard) for shard in shards}
    return found
