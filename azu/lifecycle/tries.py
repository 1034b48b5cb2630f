"""A job whose workers are gone, or for which there is no room now, waits and is tried again."""

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from azu.errors import AzuError, DeadlineExceeded, InsufficientCapacity, WorkerLost
from azu.lifecycle.ports import Ran, Route
from azu.planner.admission import NEVER_FITS
from azu.protocol.job import FinishReason

log = logging.getLogger(__name__)

_MAY_PASS = (InsufficientCapacity, WorkerLost, DeadlineExceeded)

Try = Callable[[], Awaitable[tuple[Ran, Route]]]


@dataclass(frozen=True, slots=True)
class Patience:
    """How a job waits: up to `first_s` before its second try, twice as long each time, at most `longest_s`.

    It fails when `budget_s` have passed since it last got a token.
    """

    first_s: float
    longest_s: float
    budget_s: float

    def wait_s(self, tries: int, chance: random.Random) -> float:
        """Return how long to wait after so many tries; half of it is chance, or jobs would come in waves."""
        return min(self.longest_s, self.first_s * 2.0 ** (tries - 1)) * chance.uniform(0.5, 1.0)


async def keep_trying(
    once: Try,
    patience: Patience,
    *,
    wait: Callable[[float], Awaitable[bool]],
    chance: random.Random,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Ran, Route]:
    """Try a job until it ends, waits in vain or has an error that waiting does not help.

    Every try goes on after the tokens that there are. `wait(seconds)` says whether the job is still wanted.
    """
    kept, route = Ran(completion_tokens=0, finish_reason=FinishReason.ERROR), Route({}, ())
    tries, failed_s, had_workers = 0, clock(), False
    while True:
        ran, now_on = await once()
        is_further = ran.completion_tokens > kept.completion_tokens
        if is_further or not kept.completion_tokens:
            kept, route = ran, now_on
        else:
            # This try added nothing; what was delivered before stays delivered, and paid.
            kept = replace(kept, finish_reason=ran.finish_reason, error=ran.error)
        had_workers = had_workers or is_further or isinstance(ran.error, WorkerLost)
        if ran.error is None or not _may_pass(ran.error, had_workers=had_workers):
            return kept, route
        if is_further or not tries:
            tries, failed_s = 0, clock()
        tries += 1
        wait_s = patience.wait_s(tries, chance)
        if clock() - failed_s + wait_s > patience.budget_s:
            return replace(kept, error=_given_up(ran.error, tries, clock() - failed_s)), route
        log.warning("tried again in %.1f s: %s", wait_s, ran.error.message)
        if not await wait(wait_s):
            return replace(kept, finish_reason=FinishReason.CANCELLED, error=None), route


def _may_pass(error: AzuError, *, had_workers: bool) -> bool:
    """Say whether waiting may help; what fitted once fits again when somebody joins."""
    return isinstance(error, _MAY_PASS) and (error.code != NEVER_FITS or had_workers)


def _given_up(error: AzuError, tries: int, seconds: float) -> WorkerLost:
    return WorkerLost(f"given up after {tries} tries in {seconds:.0f} s: {error.message}")
