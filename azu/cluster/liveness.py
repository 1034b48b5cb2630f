"""Whether a piece lives, is slow or hangs, by the answers that it gives while it computes.

A piece whose count of steps and layers moves is at most slow: it is waited for. One whose count stands still
for long, while it computes or does not answer, hangs. The asker may be late itself: that time counts for no
piece.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from statistics import median

from azu.protocol.node import Node
from azu.protocol.step import PieceProgress, PieceState
from azu.protocol.topology import PieceKey

# A count may stand still for the larger of these: seconds, and steps as long as recent ones.
STILL_S = 60.0
STILL_STEPS = 50
# Before a fresh piece's first answer, and in its first step, it has so many times as long.
_GRACE = 5
# After a count that stood still for more than half of its time moved, twice the time is given for so long.
_PATIENT_S = 600.0
# A step that takes so many times as long as expected, and so many seconds, is slow.
_SLOW_STEPS = 5
_SLOW_S = 5.0
# An asker that looks later than this after its last look was busy or stopped: it heard nothing meanwhile.
_LONGEST_LOOK_S = 1.5
# A node whose pieces take so many times as long as before, while the others of their model do not, is slow.
SLOW_FACTOR = 3.0


class Pulse(StrEnum):
    """A STEADY piece comes on as expected, a SLOW one comes on, a HUNG one does not."""

    STEADY = "steady"
    SLOW = "slow"
    HUNG = "hung"


class PieceWatch:
    """Judges one piece by its answers; all times are of the caller's clock, in seconds."""

    def __init__(self, now_s: float) -> None:
        self._moved_s = now_s
        self._looked_s = now_s
        self._patient_until_s = now_s
        self._progress: PieceProgress | None = None

    @property
    def slowdown(self) -> float:
        """How many times as long as the quickest ones the piece's recent steps take."""
        return 1.0 if self._progress is None else self._progress.slowdown

    @property
    def is_computing(self) -> bool:
        """Whether the piece was in a step when it answered last."""
        return self._progress is not None and self._progress.state is not PieceState.IDLE

    @property
    def bound_s(self) -> float:
        """How long the count may stand still."""
        now = self._progress
        is_fresh = now is None or (now.expected_s is None and now.state is not PieceState.IDLE)
        steps_s = 0.0 if now is None or now.expected_s is None else STILL_STEPS * now.expected_s
        bound_s = _GRACE * STILL_S if is_fresh else max(STILL_S, steps_s)
        return 2 * bound_s if self._looked_s < self._patient_until_s else bound_s

    def answered(self, progress: PieceProgress, now_s: float) -> None:
        """Take an answer."""
        before, self._progress = self._progress, progress
        is_busy = progress.state is PieceState.BUSY
        if before is not None and is_busy and progress.count == before.count:
            return
        if now_s - self._moved_s >= self.bound_s / 2:
            self._patient_until_s = now_s + _PATIENT_S
        self._moved_s = now_s

    def judge(self, now_s: float) -> Pulse:
        """Say how the piece is; called about once a second."""
        # What the caller missed itself is no silence of the piece.
        missed_s = max(0.0, now_s - self._looked_s - _LONGEST_LOOK_S)
        self._moved_s, self._looked_s = min(now_s, self._moved_s + missed_s), now_s
        still_s = now_s - self._moved_s
        if still_s >= self.bound_s:
            return Pulse.HUNG
        expected_s = self._progress.expected_s if self._progress is not None else None
        return Pulse.SLOW if still_s >= max(_SLOW_S, _SLOW_STEPS * (expected_s or 0.0)) else Pulse.STEADY


class UnansweredCall:
    """A call of a piece that has not answered in time: it is slow, or has not got the call."""

    def __init__(self) -> None:
        self._idle: tuple[int, int] | None = None  # what the piece had done when it was last idle

    def is_lost(self, progress: PieceProgress) -> bool:
        """Take how far the piece is; say whether it was idle the last time and all the time since."""
        before, self._idle = self._idle, progress.count if progress.state is PieceState.IDLE else None
        return before is not None and before == self._idle


def relative_slowdowns(slowdowns: Mapping[PieceKey, float]) -> dict[PieceKey, float]:
    """Return how many times each piece of a model is slowed down more than the others are.

    Where all are slowed down alike, no place is better than another.
    """
    found = {}
    for key, slowdown in slowdowns.items():
        others = [one for other, one in slowdowns.items() if other != key]
        found[key] = slowdown / max(1.0, median(others)) if others else slowdown
    return found


class SlowNodes:
    """The nodes on which pieces were slow lately, with the factor by which they were; times in seconds.

    A piece that has left a slow node measures it no more, so the node counts as slow for `memory_s`.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._until_s: dict[str, tuple[float, float]] = {}  # node id -> factor, when it is forgotten

    def note(self, factors: Mapping[str, float], now_s: float) -> None:
        """Take how slow nodes are now; a factor below `SLOW_FACTOR` is not slow."""
        self._until_s = {one: slow for one, slow in self._until_s.items() if now_s < slow[1]}
        for node_id, factor in factors.items():
            if factor >= SLOW_FACTOR:
                self._until_s[node_id] = (factor, now_s + self._memory_s)

    def slowed(self, nodes: Sequence[Node], now_s: float) -> list[Node]:
        """Return the nodes with the speeds that they have now."""
        return [
            replace(
                one,
                memory_bytes_per_s=one.memory_bytes_per_s / factor,
                flops_per_s=one.flops_per_s / factor,
            )
            if (factor := self._factor(one.node_id, now_s)) > 1
            else one
            for one in nodes
        ]

    def _factor(self, node_id: str, now_s: float) -> float:
        factor, until_s = self._until_s.get(node_id, (1.0, now_s))
        return factor if now_s < until_s else 1.0
