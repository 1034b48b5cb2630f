"""A job outlives its workers: it waits longer each time, keeps its tokens, and at last says why it ends."""

import asyncio
import random
from collections.abc import Mapping

from azu.config.network import RetryPolicy
from azu.errors import AzuError, InsufficientCapacity, InvalidRequest, WorkerLost
from azu.jobs.dispatch import keep_trying
from azu.planner.plan import NEVER_FITS
from azu.protocol.job import FinishReason, JobRun

PATIENCE = RetryPolicy(first_s=1, longest_s=8, budget_s=60)
OLD, NEW = {"a": "0xa"}, {"b": "0xb"}  # payout addresses by node
LOST = WorkerLost("stage 1 is gone")
NO_ROOM = InsufficientCapacity("no node has room")
TOO_LARGE = InsufficientCapacity("no node will ever have room", code=NEVER_FITS)


def failed(tokens: int, error: AzuError, payouts: Mapping[str, str] = OLD) -> JobRun:
    return JobRun(
        completion_tokens=tokens, finish_reason=FinishReason.ERROR, error=error, payout_by_node=payouts
    )


def done(tokens: int) -> JobRun:
    return JobRun(completion_tokens=tokens, finish_reason=FinishReason.LENGTH, payout_by_node=NEW)


class Life:
    """A job with a clock of its own that only waiting moves."""

    def __init__(self, *tries: JobRun, wanted_for: int = 1000) -> None:
        self.tries = list(tries)
        self.waited_s: list[float] = []
        self.wanted_for = wanted_for

    async def once(self) -> JobRun:
        # The last try's answer is every later one's too.
        return self.tries.pop(0) if len(self.tries) > 1 else self.tries[0]

    async def wait(self, seconds: float) -> bool:
        self.waited_s.append(seconds)
        return len(self.waited_s) < self.wanted_for

    def end(self) -> JobRun:
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
    life = Life(failed(7, LOST), failed(0, NO_ROOM, {}), done(20))

    assert life.end() == done(20)
    assert len(life.waited_s) == 2


def test_waits_double_up_to_the_longest_and_are_never_all_alike() -> None:
    life = Life(failed(0, NO_ROOM))

    life.end()

    for waited_s, most_s in zip(life.waited_s, (1, 2, 4, 8, 8, 8), strict=False):
        assert most_s / 2 <= waited_s <= most_s
    assert len({round(waited_s, 6) for waited_s in life.waited_s}) == len(life.waited_s)
    assert sum(life.waited_s) <= PATIENCE.budget_s


def test_what_was_delivered_stays_paid_when_nothing_helps() -> None:
    life = Life(failed(7, LOST), failed(0, NO_ROOM, {}))

    run = life.end()

    assert (run.completion_tokens, run.finish_reason, run.payout_by_node) == (7, FinishReason.ERROR, OLD)
    assert isinstance(run.error, WorkerLost)
    assert NO_ROOM.message in run.error.message


def test_tokens_that_come_give_a_job_its_patience_back() -> None:
    losses = [failed(tokens, LOST) for tokens in range(1, 200)]
    life = Life(*losses, done(200))

    assert life.end() == done(200)
    assert max(life.waited_s) <= PATIENCE.first_s


def test_what_waiting_does_not_help_ends_at_once() -> None:
    for error in (TOO_LARGE, InvalidRequest("too long")):
        life = Life(failed(0, error))
        assert life.end().error is error
        assert life.waited_s == []


def test_a_model_that_fitted_once_is_waited_for_when_its_nodes_are_gone() -> None:
    life = Life(failed(0, LOST), failed(0, TOO_LARGE), done(9))

    assert life.end() == done(9)


def test_a_job_that_is_given_up_while_it_waits_pays_for_what_it_got() -> None:
    run = Life(failed(7, LOST), wanted_for=1).end()

    assert run == JobRun(7, FinishReason.CANCELLED, payout_by_node=OLD)
