"""How long 8 KiB take from one actor to another, in calls that nobody waits for."""

import time
from itertools import pairwise
from statistics import median
from typing import Any

import ray
from ray.actor import ActorHandle

from azu.cli.bench.cluster import ray_here
from azu.cli.bench.results import Figure
from azu.engine.reference import ModelShape

_FRAME_BYTES = 8 * 1024
_ROUNDS = 500
_TIMEOUT_S = 60.0
_LIMIT_MS = 1.0


class Bouncer:
    """Sends each frame back to where it came from."""

    def __init__(self) -> None:
        self._arrived: list[float] = []
        self._sent: Any = None

    def meet(self, other: ActorHandle) -> None:
        """Learn who sends frames."""
        self._other = other

    def bounce(self, frame: bytes, hops: int) -> None:
        """Send a frame on for as many hops as are left."""
        self._arrived.append(time.perf_counter())
        if hops:
            # The answer is this call's acknowledgement; it is let go when the next one has come.
            self._sent = self._other.bounce.remote(frame, hops - 1)

    def arrived(self) -> list[float]:
        """Return when frames came."""
        return self._arrived


def hops_s(left: ActorHandle, right: ActorHandle, frame_bytes: int, rounds: int) -> list[float]:
    """Have a frame go to and fro between two Bouncers; return half the time of each round."""
    ray.get([left.meet.remote(right), right.meet.remote(left)], timeout=_TIMEOUT_S)
    left.bounce.remote(bytes(frame_bytes), 2 * rounds)
    arrived: list[float] = []
    deadline = time.monotonic() + _TIMEOUT_S
    while len(arrived) <= rounds and time.monotonic() < deadline:
        time.sleep(1.0)
        arrived = ray.get(left.arrived.remote(), timeout=_TIMEOUT_S)
    return [(later - earlier) / 2 for earlier, later in pairwise(arrived)]


def measure(_shape: ModelShape) -> tuple[Figure, ...]:
    """Return the median of half a round between two actors."""
    with ray_here():
        left, right = (ray.remote(Bouncer).options(num_cpus=0).remote() for _ in range(2))
        hops = sorted(hops_s(left, right, _FRAME_BYTES, _ROUNDS))
    return (
        Figure(
            name="hop of an 8 KiB frame between actors",
            unit="ms",
            value=median(hops) * 1e3,
            reference=_LIMIT_MS,
            reference_name="the limit",
            at_most=1.0,
            notes={"99th percentile ms": hops[len(hops) * 99 // 100] * 1e3},
        ),
    )
