"""The time of a frame between two nodes, as far as it was measured."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from azu.protocol.node import Node


def rounded(measured: float) -> float:
    """Round what was measured to two digits: the third is noise, and must not outweigh a cached shard."""
    return float(f"{measured:.1e}")


def link_s(node: Node, other: Node, hop_s: float) -> float:
    """Return the time of a frame: at least `hop_s`, and what is slower where both sides measured."""
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
