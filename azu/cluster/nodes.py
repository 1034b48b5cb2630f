"""The nodes: the last report of each, how long it has been silent, and the room that is left on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from azu.protocol.node import Node, NodeState

# A scheduler that was busy itself for longer than this between two checks missed reports: no node was silent.
_LONGEST_CHECK_S = 1.5
_MOST_DOUBLINGS = 8


# A node that was silent for more than half of its time gets twice the time for so long.
_PATIENT_S = 600.0


@dataclass(slots=True)
class _Entry:
    """A node's last report, when it came, and from when on the node gets new work; times in seconds.

    At `heard_s` one of its processes answered last, whatever it was asked.
    """

    node: Node
    reported_s: float
    trusted_s: float
    heard_s: float
    patient_until_s: float
    is_dead: bool = False
    bad_frames: int = 0


class NodeTable:
    """The last report of every node; a missing report makes a node suspect after `suspect_s`.

    A node is dead when none of its processes has answered for `dead_s`, or when Ray says so: a busy machine
    answers late, but not at all of its processes. `on_dead` is called with its id once for each death. A dead
    node that reports again gets no new work for `dead_s`. The clock is the caller's, in seconds.
    """

    def __init__(
        self, *, suspect_s: float, dead_s: float, on_dead: Callable[[str], None] = lambda _: None
    ) -> None:
        self._suspect_s = suspect_s
        self._dead_s = dead_s
        self._on_dead = on_dead
        self._entries: dict[str, _Entry] = {}
        self._checked_s: float | None = None

    def record(self, node: Node, now_s: float) -> None:
        """Take a node's report."""
        entry = self._entries.get(node.node_id)
        if entry is None:
            self._entries[node.node_id] = _Entry(node, now_s, now_s, heard_s=now_s, patient_until_s=now_s)
            return
        if entry.is_dead:
            entry.trusted_s = now_s + self._dead_s
        self.heard(node.node_id, now_s)
        entry.node, entry.reported_s, entry.is_dead = node, now_s, False

    def heard(self, node_id: str, now_s: float) -> None:
        """Take that a process of a node answered."""
        if entry := self._entries.get(node_id):
            if now_s - entry.heard_s >= self._limit_s(entry, now_s) / 2:
                entry.patient_until_s = now_s + _PATIENT_S
            entry.heard_s = now_s

    def blame(self, node_id: str, now_s: float) -> None:
        """Count a bad frame of a node and suspect it, for longer each time."""
        if entry := self._entries.get(node_id):
            self._suspect(entry, now_s, self._suspect_s * 2 ** min(entry.bad_frames, _MOST_DOUBLINGS))
            entry.bad_frames += 1

    def suspect(self, node_id: str, now_s: float) -> None:
        """Suspect a node at once that does not answer."""
        if entry := self._entries.get(node_id):
            self._suspect(entry, now_s, self._suspect_s)

    def remove(self, node_id: str) -> None:
        """Forget a node that left, or that Ray reports as dead."""
        entry = self._entries.pop(node_id, None)
        if entry is not None and not entry.is_dead:
            self._on_dead(node_id)

    def judge(self, now_s: float) -> None:
        """Declare the nodes dead of which nothing was heard for too long; called once a second."""
        self._forgive_missed(now_s)
        for node_id, entry in sorted(self._entries.items()):
            if not entry.is_dead and now_s - entry.heard_s >= self._limit_s(entry, now_s):
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
        same room twice. `given_back_bytes` are those of loaded pieces that are to go.
        """
        self._forgive_missed(now_s)
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
        """Return the last report of each node that is not dead, unchanged."""
        return tuple(entry.node for _, entry in sorted(self._entries.items()) if not entry.is_dead)

    def _forgive_missed(self, now_s: float) -> None:
        """Count no silence for a time in which the scheduler took no reports."""
        last_s = now_s if self._checked_s is None else self._checked_s
        missed_s = now_s - last_s - _LONGEST_CHECK_S
        if missed_s > 0:
            for entry in self._entries.values():
                entry.reported_s = min(now_s, entry.reported_s + missed_s)
                entry.heard_s = min(now_s, entry.heard_s + missed_s)
        self._checked_s = now_s

    def _state(self, entry: _Entry, now_s: float) -> NodeState:
        if entry.is_dead or now_s - entry.heard_s >= self._limit_s(entry, now_s):
            return NodeState.DEAD
        is_suspect = now_s - entry.reported_s >= self._suspect_s or now_s < entry.trusted_s
        if is_suspect and entry.node.state is NodeState.ALIVE:
            return NodeState.SUSPECT
        return entry.node.state

    def _suspect(self, entry: _Entry, now_s: float, suspect_s: float) -> None:
        entry.trusted_s = max(entry.trusted_s, now_s + suspect_s)

    def _limit_s(self, entry: _Entry, now_s: float) -> float:
        return 2 * self._dead_s if now_s < entry.patient_until_s else self._dead_s
