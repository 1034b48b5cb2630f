"""The nodes: the last report of each, how long it has been silent, and the room that is left on it."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from azu.errors import Conflict, NotFound, OtherVersion
from azu.protocol.node import Node, NodeState
from azu.protocol.versions import Versions

# A scheduler that was busy itself for longer than this between two checks missed reports: no node was silent.
_LONGEST_CHECK_S = 1.5
_MOST_DOUBLINGS = 8
_MARK_S = 3600.0
_MARKING_OWNERS = 3
_LEFT_OUT_S = 3600.0
# A node that left is shown for so long.
_SHOWN_S = 600.0

_Layer = tuple[str, int]  # the model's id, and the layer's number


# A node that was silent for more than half of its time gets twice the time for so long.
_PATIENT_S = 600.0


def node_called(name: str, nodes: Iterable[Node]) -> Node:
    """Return the node with a name, or with an id that begins so, by at least eight digits.

    Raises NotFound, and Conflict where more than one has the name.
    """
    found = [one for one in nodes if one.name == name or (len(name) >= 8 and one.node_id.startswith(name))]
    if not found:
        raise NotFound(f"no node {name} of yours lends here", param="name")
    if len(found) > 1:
        ids = ", ".join(sorted(one.node_id[:12] for one in found))
        raise Conflict(f"{len(found)} nodes are called {name}: give one's id instead, of {ids}", param="name")
    return found[0]


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
    left_out: int = 0
    left_out_until_s: float = 0.0


class NumericsMarks:
    """Marks of nodes that computed values for a sequence that are not finite, by the layer of a model.

    A text may exceed a model's dtype on any node. Marks by three owners within an hour put a node in doubt,
    and its pieces are to move. A mark at another node, for the same layer, shows that the texts or the model
    are at fault, once and for all. An hour without one, after the node gave its pieces away, blames it.
    The clock is the caller's, in seconds.
    """

    def __init__(self) -> None:
        self._marks: dict[_Layer, list[_Mark]] = {}
        self._doubts: dict[_Layer, _Doubt] = {}
        self._excused: set[_Layer] = set()

    def mark(self, layer: _Layer, node_id: str, owner: str, now_s: float) -> None:
        """Mark a node for a sequence of `owner`."""
        if layer in self._excused:
            return
        marks = [one for one in self._marks.get(layer, ()) if now_s - one.at_s < _MARK_S]
        marks.append(_Mark(node_id, owner, now_s))
        self._marks[layer] = marks
        doubt = self._doubts.get(layer)
        if {one.node_id for one in marks} | {doubt.node_id if doubt else node_id} != {node_id}:
            self._excused.add(layer)
            del self._marks[layer]
            self._doubts.pop(layer, None)
        elif doubt is None and len({one.owner for one in marks}) >= _MARKING_OWNERS:
            self._doubts[layer] = _Doubt(node_id)

    @property
    def doubted(self) -> frozenset[str]:
        """The nodes in doubt."""
        return frozenset(doubt.node_id for doubt in self._doubts.values())

    def judge(self, holders: Collection[str], now_s: float) -> frozenset[str]:
        """Return the nodes to blame now; `holders` are those that hold pieces. Called again and again."""
        blamed = set()
        for layer, doubt in list(self._doubts.items()):
            if doubt.node_id in holders:
                doubt.gone_s = None
            elif doubt.gone_s is None:
                doubt.gone_s = now_s
            elif now_s - doubt.gone_s >= _MARK_S:
                blamed.add(doubt.node_id)
                del self._doubts[layer], self._marks[layer]
        return frozenset(blamed)


@dataclass(frozen=True, slots=True)
class _Mark:
    node_id: str
    owner: str
    at_s: float


@dataclass(slots=True)
class _Doubt:
    """A node in doubt, and since when it holds no piece any more."""

    node_id: str
    gone_s: float | None = None


class NodeVersions:
    """What the nodes of a network understand: stages talk to each other, so all share one version at least.

    `refused` has, by id, why nodes are left alone.
    """

    def __init__(self, own: Versions) -> None:
        self._own = own
        self._taken: dict[str, Versions] = {}
        self.refused: dict[str, str] = {}

    def take(self, node_id: str, versions: Versions) -> bool:
        """Say whether a node gets work; those that were taken before stay."""
        shared = self._own
        for other in self._taken.values():
            shared = shared.common(other) or shared  # what was taken shares a version
        try:
            shared.check_node(versions)
        except OtherVersion as error:
            self.refused[node_id] = error.message
            return False
        self._taken[node_id] = versions
        return True

    def knows(self, node_id: str) -> bool:
        """Return whether a node has said what it understands."""
        return node_id in self._taken or node_id in self.refused

    def forget(self, node_id: str) -> None:
        """Forget a node that is gone."""
        self._taken.pop(node_id, None)
        self.refused.pop(node_id, None)


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
        self._left: dict[str, _Entry] = {}
        self._checked_s: float | None = None
        self.marks = NumericsMarks()

    def record(self, node: Node, now_s: float) -> None:
        """Take a node's report."""
        entry = self._entries.get(node.node_id)
        if entry is None:
            self._entries[node.node_id] = _Entry(node, now_s, now_s, heard_s=now_s, patient_until_s=now_s)
            return
        if entry.is_dead:
            entry.trusted_s = max(entry.trusted_s, now_s + self._dead_s)
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

    def leave_out(self, node_id: str, now_s: float) -> None:
        """Suspect a node that changes tokens, for an hour and longer each time; its pieces are to move."""
        if entry := self._entries.get(node_id):
            seconds = _LEFT_OUT_S * 2 ** min(entry.left_out, _MOST_DOUBLINGS)
            entry.left_out += 1
            entry.left_out_until_s = now_s + seconds
            self._suspect(entry, now_s, seconds)

    def suspect(self, node_id: str, now_s: float) -> None:
        """Suspect a node at once that does not answer."""
        if entry := self._entries.get(node_id):
            self._suspect(entry, now_s, self._suspect_s)

    def remove(self, node_id: str, now_s: float, *, ended: bool = False) -> None:
        """Forget a node that Ray reports as gone; `ended` says that it did not die, but was ended."""
        entry = self._entries.pop(node_id, None)
        if entry is None:
            return
        self._forget_left(now_s)
        if ended or entry.node.state is NodeState.LEAVING:
            node = replace(entry.node, state=NodeState.LEFT, vram_free_bytes=0, bad_frames=entry.bad_frames)
            self._left[node_id] = replace(entry, node=node, reported_s=now_s)
        if not entry.is_dead:
            self._on_dead(node_id)

    def left(self, now_s: float) -> tuple[Node, ...]:
        """Return the nodes that left in the last minutes, without those of a name that is there again."""
        self._forget_left(now_s)
        names = {entry.node.name for entry in self._entries.values()}
        latest = {one.node.name: one.node for one in self._left.values() if one.node.name not in names}
        return tuple(latest.values())

    def _forget_left(self, now_s: float) -> None:
        self._left = {
            node_id: one for node_id, one in self._left.items() if now_s - one.reported_s < _SHOWN_S
        }

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

    def reports(self, now_s: float) -> tuple[Node, ...]:
        """Return the last report of each node that is not dead; one in doubt or left out is SUSPECT in it."""
        return tuple(
            replace(entry.node, state=NodeState.SUSPECT)
            if node_id in self.marks.doubted or now_s < entry.left_out_until_s
            else entry.node
            for node_id, entry in sorted(self._entries.items())
            if not entry.is_dead
        )

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
            return NodeState.LEFT if entry.node.state is NodeState.LEAVING else NodeState.DEAD
        is_late = now_s - entry.reported_s >= self._suspect_s
        is_suspect = is_late or now_s < entry.trusted_s or entry.node.node_id in self.marks.doubted
        if is_suspect and entry.node.state is NodeState.ALIVE:
            return NodeState.SUSPECT
        return entry.node.state

    def _suspect(self, entry: _Entry, now_s: float, suspect_s: float) -> None:
        entry.trusted_s = max(entry.trusted_s, now_s + suspect_s)

    def _limit_s(self, entry: _Entry, now_s: float) -> float:
        return 2 * self._dead_s if now_s < entry.patient_until_s else self._dead_s
