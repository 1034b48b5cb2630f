"""A job outlives its workers: it waits longer each time, keeps its tokens, and at last says why it ends."""

import asyncio
import random
from collections.abc import Sequence

from azu.config.network import RetryPolicy
from azu.errors import AzuError, InsufficientCapacity, InvalidRequest, WorkerLost
from azu.jobs.dispatch import keep_trying
from azu.planner.plan import NEVER_FITS
from azu.protocol.job import FinishReason, Ran, Route

PATIENCE = RetryPolicy(first_s=1, longest_s=8, budget_s=60)
OLD, NEW = Route({"a": "0xa"}, ()), Route({"b": "0xb"}, ())
LOST = WorkerLost("stage 1 is gone")
NO_ROOM = InsufficientCapacity("no node has room")
TOO_LARGE = InsufficientCapacity("no node will ever have room", code=NEVER_FITS)


def failed(tokens: int, error: AzuError) -> Ran:
    return Ran(completion_tokens=tokens, finish_reason=FinishReason.ERROR, error=error)


def done(tokens: int) -> Ran:
    return Ran(completion_tokens=tokens, finish_reason=FinishReason.LENGTH)


class Life:
    """A job with a clock of its own that only waiting moves."""

    def __init__(self, *tries: tuple[Ran, Route], wanted_for: int = 1000) -> None:
        self.tries = list(tries)
        self.waited_s: list[float] = []
        self.wanted_for = wanted_for

    async def once(self) -> tuple[Ran, Route]:
        # The last try's answer is every later one's too.
        return self.tries.pop(0) if len(self.tries) > 1 else self.tries[0]

    async def wait(self, seconds: float) -> bool:
        self.waited_s.append(seconds)
        return len(self.waited_s) < self.wanted_for

    def end(self) -> tuple[Ran, Route]:
        return asyncio.run(
            keep_trying(
                self.once,
                PATIENCE,
                wait=self.wait,
                chance=random.Random(1),
                clock=lambda: sum(self.waited_s),
            )
        )


def test_a_job_that_lost_its_workers_ends_as_its_last_try_does() -> None:
    life = Life((failed(7, LOST), OLD), (failed(0, NO_ROOM), Route({}, ())), (done(20), NEW))

    assert life.end() == (done(20), NEW)
    assert len(life.waited_s) == 2


def test_waits_double_up_to_the_longest_and_are_never_all_alike() -> None:
    life = Life((failed(0, NO_ROOM), OLD))

    life.end()

    for waited_s, most_s in zip(life.waited_s, (1, 2, 4, 8, 8, 8), strict=False):
        assert most_s / 2 <= waited_s <= most_s
    assert len({round(waited_s, 6) for waited_s in life.waited_s}) == len(life.waited_s)
    assert sum(life.waited_s) <= PATIENCE.budget_s


def test_what_was_delivered_stays_paid_when_nothing_helps() -> None:
    life = Life((failed(7, LOST), OLD), (failed(0, NO_ROOM), Route({}, ())))

    ran, route = life.end()

    assert (ran.completion_tokens, ran.finish_reason, route) == (7, FinishReason.ERROR, OLD)
    assert isinstance(ran.error, WorkerLost)
    assert NO_ROOM.message in ran.error.message


def test_tokens_that_come_give_a_job_its_patience_back() -> None:
    losses: Sequence[tuple[Ran, Route]] = [(failed(tokens, LOST), OLD) for tokens in range(1, 200)]
    life = Life(*losses, (done(200), NEW))

    assert life.end()[0] == done(200)
    assert max(life.waited_s) <= PATIENCE.first_s


def test_what_waiting_does_not_help_ends_at_once() -> None:
    for error in (TOO_LARGE, InvalidRequest("too long")):
        life = Life((failed(0, error), OLD))
        assert life.end()[0].error is error
        assert life.waited_s == []


def test_a_model_that_fitted_once_is_waited_for_when_its_nodes_are_gone() -> None:
    life = Life((failed(0, LOST), OLD), (failed(0, TOO_LARGE), OLD), (done(9), NEW))

    assert life.end() == (done(9), NEW)


def test_a_job_that_is_given_up_while_it_waits_pays_for_what_it_got() -> None:
    ran, route = Life((failed(7, LOST), OLD), wanted_for=1).end()

    assert (ran.completion_tokens, ran.finish_reason, ran.error, route) == (
        7,
        FinishReason.CANCELLED,
        None,
        OLD,
    )
