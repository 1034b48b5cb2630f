"""The live nodes of a plan, as arrays in the order of their ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from azu.planner.demand import MemoryDemand
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import EMBED, Shard, Structure
from azu.units import MIB


def rounded(measured: float) -> float:
    """Round a measurement to two digits: the third is noise, and must not outweigh a cached shard."""
    return float(f"{measured:.1e}")


def link_s(node: Node, other: Node, hop_s: float) -> float:
    """Return the time of a frame between two nodes: the slower of their measurements, at least `hop_s`."""
    measured = (node.links_s.get(other.node_id, 0.0), other.links_s.get(node.node_id, 0.0))
    return max(hop_s, *map(rounded, measured))


def link_matrix(nodes: Sequence[Node], hop_s: float) -> NDArray[np.float64] | None:
    """Return [node, other] -> `link_s`, or None when no link is slower than `hop_s`."""
    place = {node.node_id: index for index, node in enumerate(nodes)}
    links_s = np.full((len(nodes), len(nodes)), hop_s)
    for index, node in enumerate(nodes):
        for node_id in node.links_s.keys() & place.keys():
            other = place[node_id]
            links_s[index, other] = links_s[other, index] = link_s(node, nodes[other], hop_s)
    return links_s if (links_s > hop_s).any() else None


def seconds_per_byte(nodes: Sequence[Node], demand: MemoryDemand, batch_size: int) -> NDArray[np.float64]:
    """Return each node's time per weight byte used, in a batch of `batch_size` sequences."""
    flops_per_byte = 2 * batch_size / demand.structure.dtype_bytes
    return np.array(
        [1 / rounded(node.memory_bytes_per_s) + flops_per_byte / rounded(node.flops_per_s) for node in nodes],
        np.float64,
    )


@dataclass(frozen=True, slots=True)
class NodePool:
    """The nodes that can take new pieces.

    `room_bytes` is free VRAM in whole MiB, the unit in which Ray assigns it. `seconds_per_byte` is a node's
    time per weight byte that a token uses: each byte is read once a step and multiplied once per sequence.
    `cached_bytes[node, layer]` is the size of a layer's shards on the node's disk. `links_s[node, other]` is
    the time of a frame, at least the policy's hop; None when no link was measured to be slower.
    """

    nodes: tuple[Node, ...]
    room_bytes: NDArray[np.int64]
    seconds_per_byte: NDArray[np.float64]
    cached_bytes: NDArray[np.int64]
    links_s: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, nodes: Sequence[Node], demand: MemoryDemand) -> "NodePool":
        """Return the live nodes of a sequence in any order."""
        alive = tuple(sorted((n for n in nodes if n.state is NodeState.ALIVE), key=lambda n: n.node_id))
        return cls(
            nodes=alive,
            room_bytes=np.array([node.vram_free_bytes // MIB * MIB for node in alive], np.int64),
            seconds_per_byte=seconds_per_byte(alive, demand, demand.policy.batch_size),
            cached_bytes=_cached_bytes(alive, demand.structure),
            links_s=link_matrix(alive, demand.policy.hop_s),
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
    """Return sha256 -> (layer, shard); the embedding belongs to the first layer, the head to the last."""
    last = structure.num_layers - 1
    found = {structure.shard(EMBED).sha256: (0, structure.shard(EMBED))}
    found |= {shard.sha256: (last, shard) for shard in structure.edge_shards(last + 1, last + 1)}
    for layer in structure.layers:
        shards = [structure.layer_shard(layer.index)]
        shards += [structure.expert_shard(layer.index, e) for e in range(layer.num_experts)]
        found |= {shard.sha256: (layer.index, shard) for shard in shards}
    return found
