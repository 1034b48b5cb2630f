"""A node: the state that it reports once a second."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from pydantic import ConfigDict

from azu.errors import InvalidRequest
from azu.printable import printable

_MOST_NAME_CHARACTERS = 64
# No device has more memory or speed, and no link between two nodes takes longer.
_MOST_BYTES, _MOST_PER_S, _LONGEST_LINK_S = 2**50, 1e18, 60.0


def plain_name(text: str) -> str:
    """Return a name that a machine gave itself as anything may show it."""
    return printable(text, _MOST_NAME_CHARACTERS)


class NodeState(StrEnum):
    """An ALIVE node takes new pieces, SUSPECT, PAUSED and LEAVING nodes keep theirs, DEAD and LEFT have none.

    The pieces of a node whose owner PAUSED it move away; it stays in the network. A node that ended as its
    owner wanted has LEFT.
    """

    ALIVE = "alive"
    SUSPECT = "suspect"
    PAUSED = "paused"
    LEAVING = "leaving"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node that joins now would hold, model id -> (its layers there, all of its layers).

    `lamports_per_gib_hour` is what owners earned lately for each GiB that they lent for an hour.
    """

    layers: Mapping[str, tuple[int, int]]
    lamports_per_gib_hour: float


@dataclass(frozen=True, slots=True)
class Node:
    """A worker's GPU, or its budget of main memory, as the planner sees it.

    `vram_free_bytes` is the memory that could be loaded now. Bandwidth and compute are measured on the node.
    `cached_shards` holds the sha256 of every shard on its disk, `links_s` the one-way latency to other nodes.
    azu's own pieces really take `vram_used_bytes`, None when the driver does not say so; other programs take
    `vram_other_bytes` on the card. `load` is the busy part of the device, 0 to 1. `bad_frames` counts the
    frames of the node that receivers refused since it joined. `why_paused` is why it is PAUSED.
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
    why_paused: str = ""

    def checked(self, lent_bytes: int) -> "Node":
        """Return a node's own report with no more memory than it lends, and names that anything may show.

        Raises InvalidRequest for numbers that no device has: others compute with them.
        """
        sizes = self.vram_total_bytes, self.vram_free_bytes, self.vram_used_bytes or 0, self.vram_other_bytes
        speeds = self.memory_bytes_per_s, self.flops_per_s
        if (
            not all(abs(one) <= _MOST_BYTES for one in sizes)
            or not all(1 <= one <= _MOST_PER_S for one in speeds)
            or not all(0 <= one <= _LONGEST_LINK_S for one in self.links_s.values())
        ):
            raise InvalidRequest("a node reports a memory, speed or link that no device has")
        texts = self.name, self.payout_address, self.device, self.why_paused
        name, payout, device, why = map(plain_name, texts)
        return replace(
            self,
            name=name,
            payout_address=payout,
            device=device,
            why_paused=why,
            vram_total_bytes=min(self.vram_total_bytes, lent_bytes),
            load=min(1.0, max(0.0, self.load)),
        )

    def room_bytes(self, placed_bytes: int, given_back_bytes: int = 0) -> int:
        """Return the bytes for more pieces beside those of `placed_bytes`, which need not be loaded yet.

        `given_back_bytes` is the size of loaded pieces that are about to go and are no longer placed.
        The result is negative when the placed pieces need more than the owner lends or other programs leave.
        """
        room = min(self.vram_free_bytes + given_back_bytes, self.vram_total_bytes - placed_bytes)
        if self.vram_used_bytes is None:
            return room
        # Memory for pieces that are not loaded yet still counts as free on the card.
        return min(room, self.vram_free_bytes + self.vram_used_bytes - placed_bytes)
