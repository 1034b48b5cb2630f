"""Which nodes there are, how long each has been silent, and what room is left on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from azu.protocol.node import Node, NodeState

# A listener that was busy itself for longer than this between two looks was deaf: no node was silent.
_LONGEST_LOOK_S = 1.5
_MOST_DOUBLINGS = 8


@dataclass(slots=True)
class _Entry:
    """A node's last report, when it came, and from when on the node is given new work."""

    node: Node
    heard_s: float
    trusted_s: float
    is_dead: bool = False
    bad_frames: int = 0


class NodeTable:
    """The last report of every node, judged by the silence since.

    `on_dead` is told a node's id once for each death, whether silence or Ray says so. A node that comes back
    from the dead gets no new work before it has spoken for as long as it takes to die. The clock is the
    caller's, in seconds.
    """

    def __init__(
        self, *, suspect_s: float, dead_s: float, on_dead: Callable[[str], None] = lambda _: None
    ) -> None:
        self._suspect_s = suspect_s
        self._dead_s = dead_s
        self._on_dead = on_dead
        self._entries: dict[str, _Entry] = {}
        self._listened_s: float | None = None

    def heard(self, node: Node, now_s: float) -> None:
        """Take a node's report."""
        before = self._entries.get(node.node_id)
        if before is None:
            trusted_s = now_s
        elif before.is_dead:
            trusted_s = now_s + self._dead_s
        else:
            trusted_s = before.trusted_s
        bad_frames = 0 if before is None else before.bad_frames
        self._entries[node.node_id] = _Entry(node, now_s, trusted_s, bad_frames=bad_frames)

    def doubted(self, node_id: str, now_s: float) -> None:
        """Suspect a node at once that sent a bad frame, for longer each time it does."""
        if entry := self._entries.get(node_id):
            doubt_s = self._suspect_s * 2 ** min(entry.bad_frames, _MOST_DOUBLINGS)
            entry.bad_frames += 1
            entry.trusted_s = max(entry.trusted_s, now_s + doubt_s)

    def gone(self, node_id: str) -> None:
        """Forget a node that Ray says is dead or that left."""
        entry = self._entries.pop(node_id, None)
        if entry is not None and not entry.is_dead:
            self._on_dead(node_id)

    def judge(self, now_s: float) -> None:
        """Declare dead who has been silent for too long; to be called once a second."""
        self._listen(now_s)
        for node_id, entry in sorted(self._entries.items()):
            if not entry.is_dead and now_s - entry.heard_s >= self._dead_s:
                entry.is_dead = True
                self._on_dead(node_id)

    def nodes(
        self,
        now_s: float,
        placed_bytes: Mapping[str, int],
        given_back_bytes: Mapping[str, int] = MappingProxyType({}),
    ) -> tuple[Node, ...]:
        """Return every node with its state and the room that is left beside what is placed on it.

        `placed_bytes` counts pieces that may not be loaded yet: live free memory alone would promise the
        same room twice. `given_back_bytes` are those of loaded pieces that would be gone.
        """
        self._listen(now_s)
        return tuple(
            replace(
                entry.node,
                state=self._state(entry, now_s),
                vram_free_bytes=max(
                    0, entry.node.room_bytes(placed_bytes.get(node_id, 0), given_back_bytes.get(node_id, 0))
                ),
                bad_frames=entry.bad_frames,
            )
            for node_id, entry in sorted(self._entries.items())
        )

    def reports(self) -> tuple[Node, ...]:
        """Return what each node that is not dead said last, as it said it."""
        return tuple(entry.node for _, entry in sorted(self._entries.items()) if not entry.is_dead)

    def _listen(self, now_s: float) -> None:
        """Forgive the silence of a time in which nobody listened."""
        last_s = now_s if self._listened_s is None else self._listened_s
        deaf_s = now_s - last_s - _LONGEST_LOOK_S
        if deaf_s > 0:
            for entry in self._entries.values():
                entry.heard_s = min(now_s, entry.heard_s + deaf_s)
        self._listened_s = now_s

    def _state(self, entry: _Entry, now_s: float) -> NodeState:
        silence_s = now_s - entry.heard_s
        if entry.is_dead or silence_s >= self._dead_s:
            return NodeState.DEAD
        is_doubtful = silence_s >= self._suspect_s or now_s < entry.trusted_s
        if is_doubtful and entry.node.state is NodeState.ALIVE:
            return NodeState.SUSPECT
        return entry.node.state
