"""Which nodes there are, how long ago each spoke, and what room is left on it."""

from collections.abc import Mapping
from dataclasses import replace

from azu.protocol.node import Node, NodeState


class NodeBook:
    """The last report of every node, judged by its age."""

    def __init__(self, *, suspect_s: float, dead_s: float) -> None:
        self._suspect_s = suspect_s
        self._dead_s = dead_s
        self._reports: dict[str, tuple[float, Node]] = {}

    def heard(self, node: Node, now_s: float) -> None:
        """Take a node's report."""
        self._reports[node.node_id] = (now_s, node)

    def gone(self, node_id: str) -> None:
        """Forget a node that Ray says is dead or that left."""
        self._reports.pop(node_id, None)

    def nodes(self, now_s: float, placed_bytes: Mapping[str, int]) -> tuple[Node, ...]:
        """Return every node with its state and the room that is left beside what is placed on it.

        `placed_bytes` counts pieces that may not be loaded yet: live free memory alone would promise the
        same room twice.
        """
        return tuple(
            replace(
                node,
                state=self._state(node, now_s - heard_s),
                vram_free_bytes=max(
                    0,
                    min(node.vram_free_bytes, node.vram_total_bytes - placed_bytes.get(node_id, 0)),
                ),
            )
            for node_id, (heard_s, node) in sorted(self._reports.items())
        )

    def _state(self, node: Node, silence_s: float) -> NodeState:
        if silence_s >= self._dead_s:
            return NodeState.DEAD
        if silence_s >= self._suspect_s and node.state is NodeState.ALIVE:
            return NodeState.SUSPECT
        return node.state
