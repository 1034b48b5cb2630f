"""What a node says of itself, once a second."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import ConfigDict


class NodeState(StrEnum):
    """ALIVE takes new pieces; SUSPECT and LEAVING keep what they have; DEAD has nothing any more."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    LEAVING = "leaving"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Node:
    """A worker machine's GPU (or CPU budget) as the planner sees it.

    `vram_free_bytes` is live: what could be loaded now. Bandwidth and compute are measured on the node.
    `cached_shards` holds the sha256 of every shard on its disk; `links_s` the one-way latency to other nodes.
    `vram_used_bytes` is what azu's own pieces really take, None where they cannot be told from others;
    `vram_other_bytes` what other programs hold on the card. `load` is the busy part of the device, 0 to 1.
    `bad_frames` counts what the node sent and its receivers refused, since it joined.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    node_id: str
    name: str
    payout_address: str
    vram_total_bytes: int
    vram_free_bytes: int
    memory_bytes_per_s: float
    flops_per_s: float
    state: NodeState = NodeState.ALIVE
    cached_shards: frozenset[str] = frozenset()
    links_s: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    vram_used_bytes: int | None = None
    vram_other_bytes: int = 0
    load: float = 0.0
    bad_frames: int = 0

    def room_bytes(self, placed_bytes: int, given_back_bytes: int = 0) -> int:
        """Return what may still be placed beside pieces of `placed_bytes`, loaded or not yet.

        `given_back_bytes` are those of loaded pieces that would be gone, which are not placed any more.
        Negative when the owner lends less, or other programs hold more, than what is placed needs.
        """
        room = min(self.vram_free_bytes + given_back_bytes, self.vram_total_bytes - placed_bytes)
        if self.vram_used_bytes is None:
            return room
        # What is placed but not loaded yet still stands as free on the card.
        return min(room, self.vram_free_bytes + self.vram_used_bytes - placed_bytes)
