"""The time of day. Code that needs it takes a function as a parameter, so that tests can replace it."""

import time


def wall_clock_ms() -> int:
    """Return the time of day in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000
