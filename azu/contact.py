"""What a process knows of another one that it calls: when it answered last, since when and why it is away."""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from azu.errors import Unavailable

RETRY_AFTER_S = 2.0
# An outage that lasts longer is not taken for one that passes by itself.
STANDING_S = 60.0
# In this time a process that was busy takes the answers that arrived meanwhile.
_SECOND_LOOK_S = 0.1
_MOST_DOUBLINGS = 100


class Contact:
    """The contact with one process; `who` names it, `verb` is "is" or "are"."""

    def __init__(self, who: str, verb: str = "is") -> None:
        self._who = who
        self._verb = verb
        self._answered_s = -math.inf
        self._away_since_s: float | None = None
        self.reason = ""

    def answers(self) -> None:
        """Note an answer, also one that refuses."""
        self._answered_s = time.monotonic()
        self._away_since_s = None

    def fails(self, error: Exception) -> Unavailable:
        """Note why the process is away; return the error for the caller."""
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
        self.reason = str(error) or "no answer came in time"
        return Unavailable(f"{self._who} did not answer: {self.reason}", retry_after_s=RETRY_AFTER_S)

    def problem(self, now_s: float | None = None) -> str | None:
        """Say since when the process is away, and after STANDING_S also why; None while it answers."""
        if self._away_since_s is None:
            return None
        away_s = (time.monotonic() if now_s is None else now_s) - self._away_since_s
        reason = f": {self.reason}" if away_s >= STANDING_S else ""
        return f"{self._who} {self._verb} away since {away_s:.0f} s{reason}"

    @asynccontextmanager
    async def unless_silent(self, silence_s: float) -> AsyncIterator[None]:
        """Raise TimeoutError once the process answered no call of this process for `silence_s`.

        A call that waits for its turn while others are answered may wait longer.
        """
        if silence_s == math.inf:
            yield
            return
        loop = asyncio.get_running_loop()
        heard_s = time.monotonic()
        timer: asyncio.TimerHandle

        def look(*, is_second: bool = False) -> None:
            nonlocal heard_s, timer
            before_s, heard_s = heard_s, max(heard_s, self._answered_s)
            if heard_s > before_s:
                timer = loop.call_later(heard_s + silence_s - time.monotonic(), look)
            elif is_second:
                limit.reschedule(loop.time())
            else:
                timer = loop.call_later(_SECOND_LOOK_S, lambda: look(is_second=True))

        async with asyncio.timeout(None) as limit:
            timer = loop.call_later(silence_s, look)
            try:
                yield
            finally:
                timer.cancel()


def doubling_s(first_s: float, longest_s: float, tries: int, chance: random.Random) -> float:
    """Return the pause after a number of tries: `first_s`, then twice as long each time up to `longest_s`.

    Half of it is random, or all that wait would come at once.
    """
    # What is away for long is tried more often than a float can double.
    return min(longest_s, first_s * 2.0 ** min(tries - 1, _MOST_DOUBLINGS)) * chance.uniform(0.5, 1.0)
