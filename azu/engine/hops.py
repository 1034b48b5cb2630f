"""How long a frame is on its way to the next stage, as far as its sender can know: clocks differ."""

from dataclasses import dataclass

# A stage that came free so shortly before it took a frame may have kept it waiting.
_IDLE_S = 0.001


@dataclass(frozen=True, slots=True)
class Stay:
    """How long a stage had had nothing to do when it took a frame, and how long it then kept the frame."""

    idle_s: float
    kept_s: float


class StageClock:
    """A stage's own clock."""

    def __init__(self) -> None:
        self._free_since_s = float("-inf")

    def stay(self, taken_s: float, done_s: float) -> Stay:
        """Return the stay of a frame that was taken and done at those times."""
        idle_s = taken_s - self._free_since_s
        self._free_since_s = done_s
        return Stay(idle_s, done_s - taken_s)


def hop_s(answered_s: float, stay: Stay) -> float | None:
    """Return the time on the way there and back of a frame that was answered after so long.

    None where the frame may have waited for a stage that was busy: that is no hop.
    """
    return max(0.0, answered_s - stay.kept_s) if stay.idle_s >= _IDLE_S else None
