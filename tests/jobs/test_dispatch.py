"""A job outlives its workers: it waits longer each time, keeps its tokens, and at last says why it ends."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from azu.config.network import RetryPolicy
from azu.errors import AzuError, InsufficientCapacity, InvalidRequest, NumericsError, WorkerLost
from azu.jobs import dispatch
from azu.jobs.dispatch import Dispatcher, keep_trying
from azu.jobs.record import JobRecord
from azu.jobs.redis import RedisJobs
from azu.jobs.settlement import Settlement
from azu.metrics import Meter
from azu.money.books import Books
from azu.planner.plan import NEVER_FITS
from azu.protocol.job import FinishReason, Job, JobOutcome, JobRun, JobState
from azu.supervision import Supervisor, end_process
from tests.builders import job
from tests.jobs.endings import outcome
from tests.jobs.test_settlement import RUN, Billing

# The jobs of these tests are as old as 1970.
PATIENCE = RetryPolicy(first_s=1, longest_s=8, budget_s=60, job_s=10**12)
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


@dataclass
class Model:
    """A deployment that answers every job with the same run."""

    answer: JobRun
    expected: list[str] = field(default_factory=list)
    blamed: list[str] = field(default_factory=list)

    async def run(self, job: Job) -> JobRun:
        return self.answer

    def expect(self, job_id: str) -> None:
        self.expected.append(job_id)

    def let_go(self, job_id: str) -> None:
        self.expected.remove(job_id)

    def blame(self, node_id: str) -> None:
        self.blamed.append(node_id)


@dataclass
class Models:
    """A cluster with one or two pipelines of each model."""

    first: Model
    second: Model | None

    async def ensure(self, model_id: str, revision: str, job_id: str) -> Model:
        self.first.expect(job_id)
        return self.first

    def beside(self, deployment: Model) -> Model | None:
        return self.second


NOT_FINITE = failed(2, NumericsError("values that are not finite", node_id="a", layer=3))


@pytest.mark.parametrize(
    ("second", "expected", "blamed"),
    [
        (done(9), done(9), ["a"]),  # its values are finite
        (NOT_FINITE, NOT_FINITE, []),
        (failed(2, LOST), failed(2, LOST), []),
        (None, NOT_FINITE, []),
    ],
)
def test_a_second_pipeline_says_whose_fault_values_are_that_are_not_finite(
    run_scenario, second: JobRun | None, expected: JobRun, blamed: list[str]
) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        models = Models(Model(NOT_FINITE), Model(second) if second else None)
        dispatcher = Dispatcher(
            jobs, models, None, consumer="test", patience=PATIENCE,
            supervisor=Supervisor("test", Meter(), end_process),
        )  # fmt: skip
        await jobs.submit(job())

        run = await dispatcher._try(JobRecord(job(), JobState.QUEUED, None, 0))

        assert run == expected
        assert models.first.blamed == blamed
        assert not models.first.expected
        assert not (models.second and models.second.expected)

    run_scenario(scenario)


class Odd:
    """A deployment whose jobs each end as `run` says."""

    def __init__(self, run: JobRun) -> None:
        self._run = run

    async def ensure(self, model_id: str, revision: str, job_id: str) -> "Odd":
        return self

    async def run(self, job: Job) -> JobRun:
        return self._run

    async def look(self) -> None:
        raise WorkerLost("there is no pipeline to look at")

    async def cancel(self, job_id: str) -> None:
        pass

    def let_go(self, job_id: str) -> None:
        pass


class OddOnce(Settlement):
    """A settlement that fails the first time, for a reason of its own."""

    num_calls = 0

    async def settle(self, job: Job, run: JobRun) -> JobOutcome:
        self.num_calls += 1
        if self.num_calls == 1:
            raise ZeroDivisionError
        return await super().settle(job, run)


def ended(redis_url: str, run: JobRun, *, once: bool = False, planned: int | None = None) -> JobOutcome:
    """Let a job end as `run` says, or as planned before with a charge of `planned`; check the books."""

    async def scenario() -> JobOutcome:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept()
        books = Books.from_url(redis_url)
        settlement = (OddOnce if once else Settlement)(books, billing.jobs, 2, 20)
        if planned is not None:
            receipt = replace(outcome(job.job_id).receipt, charged_lamports=planned)
            await billing.jobs.plan_end(job.job_id, replace(outcome(job.job_id), receipt=receipt))
        supervisor = Supervisor("test", Meter(), lambda: None)
        dispatcher = Dispatcher(
            billing.jobs, Odd(run), settlement, consumer="test", patience=PATIENCE, supervisor=supervisor
        )
        running = asyncio.create_task(dispatcher.run())
        seen = [event async for event in billing.jobs.events(job.job_id)][-1]
        while dispatcher.num_waiting + dispatcher.num_running:
            await asyncio.sleep(0.01)
        running.cancel()
        assert isinstance(seen, JobOutcome)
        assert await billing.jobs.take_over("another") == []
        assert await billing.balances() == (1_000 - seen.receipt.charged_lamports, 0)
        assert sum((await billing.ledger.balances()).values()) == 0
        return seen

    return asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FAULT_PAUSE_S", 0.01)


def test_a_fault_at_the_end_of_a_job_is_tried_again_and_charged_once(redis_url: str) -> None:
    assert ended(redis_url, RUN, once=True).receipt.charged_lamports == 2 * 4 * (4 + 6)


def test_a_job_that_cannot_be_settled_ends_with_an_error_and_releases_all(redis_url: str) -> None:
    found = ended(redis_url, replace(RUN, payout_by_node={}))

    assert found.state is JobState.FAILED
    assert found.error is not None
    assert (found.error["code"], "fault-" in str(found.error["message"])) == ("internal_error", True)


def test_a_planned_end_that_the_books_refuse_does_not_hold_its_job_for_ever(redis_url: str) -> None:
    found = ended(redis_url, RUN, planned=10_000)

    assert (found.state, found.receipt.charged_lamports) == (JobState.FAILED, 0)
