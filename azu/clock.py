"""The time of day. Code that needs it takes a function as a parameter, so that tests can replace it."""

import logging
import time
from collections.abc import Callable

_LOG = logging.getLogger(__name__)
# What a clock that is set right moves at once, at most.
_STEP_MS = 60_000

DAY_MS = 24 * 3600 * 1000


def wall_clock_ms() -> int:
    """Return the time of day in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def since_boot_ms() -> int:
    """Return the milliseconds since this machine started: this clock is never set."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class SteadyClock:
    """The time of day for what is kept: it follows this machine's clock, but no step of that one.

    After a step the time goes on as before until the clock is back, or until the chain's time is heard, which
    counts more. At its start it believes the machine's clock.
    """

    def __init__(
        self, wall_ms: Callable[[], int] = wall_clock_ms, elapsed_ms: Callable[[], int] = since_boot_ms
    ) -> None:
        self._wall_ms = wall_ms
        self._elapsed_ms = elapsed_ms
        self._started_ms = wall_ms() - elapsed_ms()
        self._is_followed = True

    def __call__(self) -> int:
        """Return the time in milliseconds since 1970, UTC."""
        steady_ms, wall_ms = self._started_ms + self._elapsed_ms(), self._wall_ms()
        is_followed = abs(wall_ms - steady_ms) <= _STEP_MS
        if is_followed:
            self._started_ms += wall_ms - steady_ms
        elif self._is_followed:
            _LOG.error(
                "this machine's clock is wrong by %d s: it is not followed", (wall_ms - steady_ms) // 1000
            )
        self._is_followed = is_followed
        return wall_ms if is_followed else steady_ms

    def hears(self, chain_ms: int) -> None:
        """Go on from the chain's time if this one is far from it."""
        if abs(chain_ms - self()) > _STEP_MS:
            self._started_ms = chain_ms - self._elapsed_ms()
