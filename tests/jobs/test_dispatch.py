"""A job outlives its workers: it waits longer each time, keeps its tokens, and at last says why it ends."""

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Container
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from azu.clock import wall_clock_ms
from azu.config.network import RetryPolicy
from azu.errors import (
    AzuError,
    InsufficientCapacity,
    InternalError,
    InvalidRequest,
    JournalFault,
    LedgerError,
    NumericsError,
    Unavailable,
    WorkerLost,
)
from azu.jobs import dispatch
from azu.jobs.dispatch import Dispatcher, keep_trying
from azu.jobs.record import MOST_FAULTS, JobRecord
from azu.jobs.redis import RedisJobs
from azu.jobs.settlement import Settlement
from azu.metrics import Meter
from azu.money.bookkeeping import Bookkeeper
from azu.money.books import NOT_PROVIDED
from azu.money.ledger.transfers import worker_earned
from azu.planner.plan import NEVER_FITS
from azu.protocol.job import PLATFORM_NODE, FinishReason, Job, JobOutcome, JobRun, JobState, Placement
from azu.protocol.phase import JobPhase
from azu.supervision import Supervisor, end_process
from tests.builders import OWNERS, OwnPipeline, job
from tests.jobs.test_settlement import RUN, WORK, Billing
from tests.money.serving import TERMS

# The jobs of these tests are as old as 1970.
PATIENCE = RetryPolicy(first_s=1, longest_s=8, budget_s=60, job_s=10**12)
OLD, NEW = ((Placement(node, "layer:0", (0, 4)),) for node in "ab")
LOST = WorkerLost("stage 1 is gone")
NO_ROOM = InsufficientCapacity("no node has room")
TOO_LARGE = InsufficientCapacity("no node will ever have room", code=NEVER_FITS)
REGISTRY_FULL = Unavailable("the registry's disk has no room", code="registry_full")


def failed(tokens: int, error: AzuError, placed: tuple[Placement, ...] = OLD) -> JobRun:
    return JobRun(tokens, FinishReason.ERROR, error=error, placements=placed)


def done(tokens: int) -> JobRun:
    return JobRun(tokens, FinishReason.LENGTH, placements=NEW)


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

    assert (run.completion_tokens, run.finish_reason, run.placements) == (7, FinishReason.ERROR, OLD)
    assert isinstance(run.error, WorkerLost)
    assert NO_ROOM.message in run.error.message


def test_tokens_that_come_give_a_job_its_patience_back() -> None:
    losses = [failed(tokens, LOST) for tokens in range(1, 200)]
    life = Life(*losses, done(200))

    assert life.end() == done(200)
    assert max(life.waited_s) <= PATIENCE.first_s


def test_what_waiting_does_not_help_ends_at_once() -> None:
    for error in (TOO_LARGE, REGISTRY_FULL, InvalidRequest("too long")):
        life = Life(failed(0, error))
        assert life.end().error is error
        assert life.waited_s == []


def test_the_books_hear_that_the_network_has_no_place_for_a_model_also_after_other_tries() -> None:
    run = Life(failed(0, LOST), failed(0, REGISTRY_FULL)).end()

    assert run.error is not None
    assert run.error.code in NOT_PROVIDED


def test_a_model_that_fitted_once_is_waited_for_when_its_nodes_are_gone() -> None:
    life = Life(failed(0, LOST), failed(0, TOO_LARGE), done(9))

    assert life.end() == done(9)


def test_a_job_that_is_given_up_while_it_waits_pays_for_what_it_got() -> None:
    run = Life(failed(7, LOST), wanted_for=1).end()

    assert run == JobRun(7, FinishReason.CANCELLED, placements=OLD)


@dataclass
class Model(OwnPipeline):
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
        self.first.pipeline.expect(job_id)
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


class Odd(OwnPipeline):
    """A deployment whose jobs each end as `run` says."""

    def __init__(self, run: object) -> None:
        self._run = run

    async def ensure(self, model_id: str, revision: str, job_id: str) -> "Odd":
        return self

    async def run(self, job: Job) -> object:
        return self._run

    phase = None

    async def phase_of(self, model_id: str, revision: str) -> None:
        pass

    async def look(self) -> None:
        raise WorkerLost("there is no pipeline to look at")

    def keep_jobs(self, job_ids: Container[str]) -> tuple[()]:
        return ()

    async def cancel(self, job_id: str) -> None:
        pass

    def let_go(self, job_id: str) -> None:
        pass


class Late(Odd):
    """A network whose nodes are not there when a job first asks for its model."""

    asked = 0

    async def ensure(self, model_id: str, revision: str, job_id: str) -> Odd:
        self.asked += 1
        if self.asked == 1:
            raise TOO_LARGE
        return self


class OddOnce(Settlement):
    """A settlement that fails the first time, for a reason of its own."""

    num_calls = 0

    async def settle(self, job: Job, run: JobRun) -> JobOutcome:
        self.num_calls += 1
        if self.num_calls == 1:
            raise ZeroDivisionError
        return await super().settle(job, run)


class Refusing(Bookkeeper):
    """Books that refuse every end."""

    error: Exception | None = None
    times = 10**6

    async def settle(self, job_id: str, **given: Any) -> JobOutcome:
        self.times -= self.error is not None
        if self.error is not None and self.times >= 0:
            raise self.error
        return await super().settle(job_id, **given)


async def lived(
    billing: Billing, job: Job, run: object, settlement: Settlement, patience_s: float = 20
) -> JobOutcome:
    """Have a dispatcher run a job whose deployment answers `run`, or is one; return how the job ends."""
    supervisor = Supervisor("test", Meter(), lambda: None)
    models = run if isinstance(run, Odd) else Odd(run)
    dispatcher = Dispatcher(
        billing.jobs, models, settlement, consumer="test", patience=PATIENCE, supervisor=supervisor
    )
    running = asyncio.create_task(dispatcher.run())
    async with asyncio.timeout(patience_s):
        seen = [event async for event in billing.jobs.events(job.job_id)][-1]
        while dispatcher.num_waiting + dispatcher.num_running:
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait({running})
    assert isinstance(seen, JobOutcome)
    assert await billing.jobs.take_over("another") == [], "nothing is tried again"
    return seen


def ended(redis_url: str, run: JobRun, *, once: bool = False, error: Exception | None = None) -> JobOutcome:
    """Let a job end as `run` says, where the books may refuse that; check the books."""

    async def scenario() -> JobOutcome:
        billing = Billing(redis_url, Refusing)
        await billing.deposit(1_000)
        job = await billing.accept()
        await billing.deliver(job, run.completion_tokens)
        billing.books.error = error
        settlement = (OddOnce if once else Settlement)(billing.books, billing.jobs)
        seen = await lived(billing, job, run, settlement)
        held = 112 if error is not None else 0
        assert await billing.balances() == (1_000 - seen.receipt.charged_lamports - held, held)
        if held:
            billing.books._now_ms = lambda: wall_clock_ms() + TERMS.reservation_ttl_ms
            await settlement.give_back()
            assert await billing.balances() == (1_000, 0), "what was reserved comes back once it is overdue"
        assert sum((await billing.accounts()).values()) == 0
        return seen

    return asyncio.run(scenario())


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FAULT_PAUSE_S", 0.01)


def test_a_fault_at_the_end_of_a_job_is_tried_again_and_charged_once(redis_url: str) -> None:
    assert ended(redis_url, RUN, once=True).receipt.charged_lamports == 2 * 4 * (4 + 6)


def test_a_job_waits_for_books_whose_journal_is_at_fault(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url, Refusing)
        await billing.deposit(1_000)
        job = await billing.accept()
        await billing.deliver(job, RUN.completion_tokens)
        billing.books.error, billing.books.times = JournalFault("refused", code="another_writer"), MOST_FAULTS
        found = await lived(billing, job, RUN, billing.settlement)
        assert (found.state, found.receipt.charged_lamports) == (JobState.DONE, 80)

    asyncio.run(scenario())


def test_work_of_a_node_that_is_not_enrolled_is_held(redis_url: str) -> None:
    work = {layer: {"c" if node == "b" else node: n for node, n in by.items()} for layer, by in WORK.items()}
    found = ended(redis_url, replace(RUN, work=work))

    assert (found.state, found.receipt.charged_lamports) == (JobState.DONE, 80)
    assert (found.receipt.worker_lamports, found.receipt.held_lamports) == ({OWNERS[0]: 40}, 24)


@pytest.mark.parametrize("error", [LedgerError("no"), InternalError("no"), ZeroDivisionError("no")])
def test_a_job_ends_whatever_the_books_refuse(redis_url: str, error: Exception) -> None:
    found = ended(redis_url, RUN, error=error)

    assert (found.state, found.receipt.charged_lamports) == (JobState.FAILED, 0)


def test_a_job_whose_run_is_lost_pays_for_the_tokens_in_its_stream(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept()
        await billing.deliver(job, 6)
        found = await lived(billing, job, failed(0, InternalError("abandoned")), billing.settlement)
        assert (found.state, found.receipt.completion_tokens) == (JobState.FAILED, 6)
        assert (found.receipt.charged_lamports, found.receipt.held_lamports) == (80, 64)

    asyncio.run(scenario())


@pytest.mark.parametrize("was_taken", [True, False])
def test_a_job_of_an_earlier_scheduler_waits_until_its_nodes_are_back(
    redis_url: str, was_taken: bool
) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept()
        await billing.deliver(job, RUN.completion_tokens)
        if was_taken:
            assert await billing.jobs.take("earlier", 1, 30_000)
        found = await lived(billing, job, Late(RUN), billing.settlement)
        assert found.state is (JobState.DONE if was_taken else JobState.FAILED)

    asyncio.run(scenario())


class Starting(Odd):
    """A network whose model does not come up for the first job."""

    async def phase_of(self, model_id: str, revision: str) -> JobPhase:
        return JobPhase("loading", f"{model_id} is coming.")

    async def ensure(self, model_id: str, revision: str, job_id: str) -> Odd:
        if job_id == "job-1":
            await asyncio.Event().wait()
        raise NO_ROOM


def test_a_job_is_told_how_far_its_model_is_or_why_it_is_tried_again(redis_url: str) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        dispatcher = Dispatcher(
            jobs, Starting(RUN), Settlement(None, jobs), consumer="test", patience=PATIENCE,
            supervisor=Supervisor("test", Meter(), end_process),
        )  # fmt: skip
        for job_id in ("job-1", "job-2"):
            await jobs.submit(job(job_id))
        running = asyncio.create_task(dispatcher.run())
        while not dispatcher._waiting:
            await asyncio.sleep(0.01)
        async with asyncio.TaskGroup() as group:
            await dispatcher._look(group)
        told = [await jobs.phase(job(job_id)) for job_id in ("job-1", "job-2")]
        running.cancel()
        await asyncio.wait({running})

        assert told == [
            JobPhase("loading", "test/model is coming."),
            JobPhase("queued", "No node has room; it is tried again soon."),
        ]

    asyncio.run(asyncio.wait_for(scenario(RedisJobs.from_url(redis_url)), 20))


class Endless(Odd):
    """A model in two pipelines, whose jobs run on; the first pipeline takes no cancellation."""

    def __init__(self) -> None:
        super().__init__(None)
        self.pipelines = {"job-1": HangingPipeline(None), "job-2": HangingPipeline(None)}
        self.pipelines["job-2"].answers.set()
        self.kept: list[set[str]] = []
        self.over: list[tuple[HangingPipeline, str]] = []

    async def ensure(self, model_id: str, revision: str, job_id: str) -> "HangingPipeline":
        return self.pipelines[job_id]

    def keep_jobs(self, job_ids: Collection[str]) -> list[tuple["HangingPipeline", str]]:
        self.kept.append(set(job_ids))
        over, self.over = self.over, []
        return over


class HangingPipeline(Odd):
    """A pipeline whose jobs run until they are cancelled, and which takes cancellations once it `answers`.

    Where it stands is a question that raises.
    """

    def __init__(self, run: object) -> None:
        super().__init__(run)
        self.answers, self.cancelled, self.num_looks = asyncio.Event(), list[str](), 0

    @property
    def phase(self) -> None:
        raise ZeroDivisionError

    async def run(self, job: Job) -> None:
        await asyncio.Event().wait()

    async def look(self) -> None:
        self.num_looks += 1

    async def cancel(self, job_id: str) -> None:
        await self.answers.wait()
        self.cancelled.append(job_id)


@asynccontextmanager
async def endless(jobs: RedisJobs, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Endless]:
    """Have two jobs run, which an earlier scheduler had taken."""
    monkeypatch.setattr(dispatch, "_LOOK_S", 0.01)
    models = Endless()
    dispatcher = Dispatcher(
        jobs, models, Settlement(None, jobs), consumer="test", patience=PATIENCE,
        supervisor=Supervisor("test", Meter(), lambda: None),
    )  # fmt: skip
    for job_id in ("job-1", "job-2"):
        await jobs.submit(job(job_id))
    await jobs.take("earlier", 1, 30_000)
    running = asyncio.create_task(dispatcher.run())
    async with asyncio.timeout(20):
        while dispatcher.num_running < 2:
            await asyncio.sleep(0.01)
        yield models
    running.cancel()
    await asyncio.wait({running})


def test_a_pipeline_that_hangs_holds_up_no_cancellation_of_another(
    run_scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        async with endless(jobs, monkeypatch) as models:
            for job_id in ("job-1", "job-2"):
                await jobs.cancel(job_id)
            while not models.pipelines["job-2"].cancelled:
                await asyncio.sleep(0.01)
            assert models.pipelines["job-1"].cancelled == []
            models.pipelines["job-1"].answers.set()
            while not models.pipelines["job-1"].cancelled:
                await asyncio.sleep(0.01)

    run_scenario(scenario)


def test_pipelines_are_watched_while_one_that_hangs_has_a_job_to_cancel_that_is_over(
    run_scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        async with endless(jobs, monkeypatch) as models:
            hangs, other = models.pipelines.values()
            models.over.append((hangs, "job-0"))
            while models.over:
                await asyncio.sleep(0.01)
            looks = other.num_looks
            while other.num_looks < looks + 3:
                await asyncio.sleep(0.01)
            assert hangs.cancelled == []
            hangs.answers.set()
            while not hangs.cancelled:
                await asyncio.sleep(0.01)
            assert hangs.cancelled == ["job-0"]

    run_scenario(scenario)


def test_pipelines_are_watched_whatever_the_question_raises_where_jobs_stand(
    run_scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        async with endless(jobs, monkeypatch) as models:
            while any(one.num_looks < 3 for one in models.pipelines.values()):
                await asyncio.sleep(0.01)

    run_scenario(scenario)


def test_deployments_keep_the_jobs_that_were_taken_over_and_later_those_that_run(
    run_scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        async with endless(jobs, monkeypatch) as models:
            while not models.kept:
                await asyncio.sleep(0.01)
            assert models.kept[0] == {"job-1", "job-2"}
            models.pipelines["job-3"] = HangingPipeline(None)
            await jobs.submit(job("job-3"))
            while models.kept[-1] != {"job-1", "job-2", "job-3"}:
                await asyncio.sleep(0.01)

    run_scenario(scenario)


def lost(message: str = "lost", code: str | None = None) -> AzuError:
    return InternalError(message, code=code)


NAMED_AS_AN_ACCOUNT = worker_earned(OWNERS[2])
IDS = st.sampled_from(
    ("a", "b", "stranger", "", 7, "-", PLATFORM_NODE, "é", "a b", "\ud800", "x" * 201, NAMED_AS_AN_ACCOUNT)
)
NUMBERS = st.one_of(
    st.integers(-1, 9), st.sampled_from([2**64, 10**40, -(10**40), 1.5, float("nan"), "9", None])
)
# More than the books take, and more digits than a division can have exactly in a moment.
MANY_NODES = {layer: {f"n{layer}-{number}": 2**64 - number for number in range(900)} for layer in range(4)}
HOSTILE_WORK = st.one_of(
    st.dictionaries(st.integers(-1, 5), st.dictionaries(IDS, NUMBERS, max_size=3), max_size=6),
    st.dictionaries(st.sampled_from([0, 1, "2", None]), NUMBERS, max_size=2),
    st.sampled_from([None, 7, "work", [1]]),
    st.sampled_from([MANY_NODES, {0: {"a": 1}, 1: {"b": 2}, 9: {"a": 1}, "job-1": {"a": 1}}]),
)
ENDS = (FinishReason.STOP, FinishReason.LENGTH)
TOO_LONG = lost("x" * 2**24), lost(code="x" * 2**24)
ERRORS = st.sampled_from(
    (None, LOST, lost(), ValueError("x"), "lost", 7, lost("\ud800"), lost(code="\ud800"), *TOO_LONG)
)
HOSTILE_RUNS = st.one_of(
    st.builds(
        JobRun,
        completion_tokens=NUMBERS,
        finish_reason=st.sampled_from([*FinishReason, "stop", "done", None]),
        work=HOSTILE_WORK,
        error=ERRORS,
        prompt_tokens_ran=NUMBERS,
    ),
    st.sampled_from([None, 7, "run", {"completion_tokens": 1}]),
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=HOSTILE_RUNS, delivered=st.integers(0, 10))
@example(run=JobRun(0, FinishReason.CANCELLED), delivered=3)  # it was not cancelled
def test_every_job_ends_and_pays_by_count_whatever_its_run_says(
    redis_url: str, run: object, delivered: int
) -> None:
    end_and_check(redis_url, run, delivered)


@pytest.mark.prove
@settings(deadline=None, max_examples=2_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=HOSTILE_RUNS, delivered=st.integers(0, 10))
def test_two_thousand_jobs_end_and_pay_by_count_whatever_their_runs_say(
    redis_url: str, run: object, delivered: int
) -> None:
    end_and_check(redis_url, run, delivered)


def end_and_check(redis_url: str, run: object, delivered: int) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.jobs._redis.flushdb()
        await billing.deposit(1_000)
        job = await billing.accept()
        await billing.deliver(job, delivered)
        found = await lived(billing, job, run, billing.settlement)

        assert (found.error is not None) == (found.state is JobState.FAILED)
        receipt, balances = found.receipt, await billing.accounts()
        if isinstance(run, JobRun) and run.error is None and any(run.finish_reason is end for end in ENDS):
            assert found.finish_reason is run.finish_reason, "what is impossible in its work ends no job"
        # No client left: before the first token nothing is charged.
        tokens = 4 + delivered if delivered else 0
        assert receipt.charged_lamports == 2 * receipt.token_layers == 2 * 4 * tokens
        paid = sum(receipt.worker_lamports.values()) + receipt.held_lamports
        assert receipt.platform_lamports + paid == receipt.charged_lamports
        assert await billing.balances() == (1_000 - receipt.charged_lamports, 0)
        assert sum(balances.values()) == 0
        assert {name for name in balances if name.startswith("worker")} <= {
            worker_earned(payout) for payout in receipt.worker_lamports
        }
        assert receipt.worker_lamports.keys() <= {OWNERS[0], OWNERS[1]}, "others are not enrolled"

    # The retries of a worker that is lost are of another test.
    patience = replace(PATIENCE, first_s=0.001, longest_s=0.001, budget_s=0.002)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.jobs.test_dispatch.PATIENCE", patience)
        asyncio.run(scenario())
