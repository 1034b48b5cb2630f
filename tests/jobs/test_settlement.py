"""A job ends once: the delivered tokens are charged and shared exactly, the rest is released."""

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from azu.clock import wall_clock_ms
from azu.errors import InsufficientBalance, InvalidRequest, NotFound, Unavailable, WorkerLost
from azu.jobs.departures import Departures
from azu.jobs.draining import Draining
from azu.jobs.in_flight_limit import InFlightLimit
from azu.jobs.intake import Intake, JobLimits, ModelFacts
from azu.jobs.record import job_key
from azu.jobs.redis import RedisJobs
from azu.jobs.settlement import Settlement
from azu.money.bookkeeping import Bookkeeper
from azu.money.ledger.transfers import worker_earned
from azu.protocol.job import FinishReason, Job, JobOutcome, JobRun, JobState, TokenEvent
from azu.protocol.sampling import SamplingParams
from azu.redis_client import connect_redis
from tests import builders
from tests.builders import OWNERS
from tests.money.accounts import BEARER, USER, fund, signed_key
from tests.money.serving import PLATFORM, TERMS

ADDRESS = USER.address.lower()

MODEL = ModelFacts(model_id="test/model", revision="r1", num_layers=4, context_length=64)
WORK = {0: {"a": 100}, 1: {"a": 100}, 2: {"b": 100}, 3: {"a": 50, "b": 50}}
# Six tokens that the work above stands for.
RUN = JobRun(6, FinishReason.STOP, WORK)


class Billing:
    """Intake and settlement over a real Redis, with books in this process."""

    def __init__(self, redis_url: str, books: type[Bookkeeper] = Bookkeeper) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.books = books(redis_url, Path(self._folder.name), PLATFORM, TERMS)
        self.jobs = RedisJobs(connect_redis(redis_url), self.books.ended)
        ids = iter(f"job-{n}" for n in range(10_000))
        self.intake = Intake(
            self.books,
            self.jobs,
            InFlightLimit(connect_redis(redis_url), self.jobs, 10_000),
            JobLimits(max_prompt_tokens=32, max_completion_tokens=40),
            Departures(connect_redis(redis_url), kept_s=600),
            Draining(connect_redis(redis_url), self.jobs),
            now_ms=lambda: 1_000,
            new_job_id=lambda: next(ids),
        )
        self.earned: list[Mapping[str, int]] = []
        self.settlement = Settlement(self.books, self.jobs, self.earned.append)

    async def deposit(self, lamports: int) -> None:
        """Credit the user, open the user's key, and enrol two nodes."""
        await fund(self.books, lamports)
        await self.books.open_key(signed_key())
        for node, owner in (("a", OWNERS[0]), ("b", OWNERS[1])):
            await self.books.enrol_node(node, owner, key_digest="k", name=node, work_bytes_per_s=0)

    async def accept(self, prompt_tokens: int = 4, max_tokens: int = 10) -> Job:
        """Accept a job of the user."""
        sampling = SamplingParams(max_tokens=max_tokens)
        prompt = tuple(range(1, prompt_tokens + 1))
        return await self.intake.accept(await self.books.key(BEARER), BEARER, MODEL, prompt, sampling)

    async def deliver(self, job: Job, tokens: int) -> None:
        """Write tokens of a job as a pipeline does."""
        if tokens:
            await self.jobs.append([(job.job_id, TokenEvent(0, (7,) * tokens))])

    async def end(self, job: Job, run: JobRun) -> JobOutcome:
        """Deliver the tokens of a run, and settle it."""
        await self.deliver(job, run.completion_tokens)
        return await self.settlement.settle(job, run)

    async def balances(self) -> tuple[int, int]:
        balance = await self.books.balance(ADDRESS)
        return balance.available_lamports, balance.reserved_lamports

    async def accounts(self) -> dict[str, int]:
        """Return all accounts that hold something."""
        return dict((await self.books.ledger()).state.balances)


def test_a_job_reserves_its_highest_price_and_pays_for_the_delivered_tokens(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept(prompt_tokens=4, max_tokens=10)
        assert job.reserved_lamports == 2 * 4 * (4 + 10)
        assert await billing.balances() == (1_000 - 112, 112)

        outcome = await billing.end(job, RUN)

        receipt = outcome.receipt
        assert receipt.charged_lamports == 2 * 4 * (4 + 6)
        assert receipt.platform_lamports == 16
        assert dict(receipt.worker_lamports) == {OWNERS[0]: 40, OWNERS[1]: 24}
        assert billing.earned == [receipt.worker_lamports]
        assert await billing.balances() == (1_000 - 80, 0)
        assert (await billing.accounts())[worker_earned(OWNERS[0])] == 40
        assert sum((await billing.accounts()).values()) == 0

    asyncio.run(scenario())


def test_settling_twice_changes_nothing(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept()
        first = await billing.end(job, RUN)
        balances = await billing.accounts()

        second = await billing.settlement.settle(job, RUN)

        assert second == first
        assert await billing.accounts() == balances

    asyncio.run(scenario())


def test_nothing_is_charged_before_the_first_token(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept()

        run = JobRun(0, FinishReason.ERROR, error=WorkerLost("stage 1 was lost"))
        outcome = await billing.end(job, run)

        assert outcome.state is JobState.FAILED
        assert outcome.error is not None
        assert outcome.error["code"] == "worker_lost"
        assert outcome.receipt.charged_lamports == 0
        assert await billing.balances() == (1_000, 0)
        record = await billing.jobs.get(job.job_id)
        assert record is not None
        assert record.state is JobState.FAILED

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "param"),
    [
        (0, 5, "prompt"),
        (33, 5, "prompt"),
        (4, 0, "max_tokens"),
        (4, 41, "max_tokens"),
        (30, 35, "max_tokens"),
    ],
)
def test_a_job_out_of_range_changes_nothing(
    redis_url: str, prompt_tokens: int, max_tokens: int, param: str
) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(10_000)
        with pytest.raises(InvalidRequest) as refused:
            await billing.accept(prompt_tokens, max_tokens)

        assert refused.value.param == param
        assert await billing.balances() == (10_000, 0)
        assert await billing.jobs.of(ADDRESS, 10) == []

    asyncio.run(scenario())


def test_a_job_above_the_balance_is_not_written(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(111)
        with pytest.raises(InsufficientBalance):
            await billing.accept(prompt_tokens=4, max_tokens=10)

        assert await billing.balances() == (111, 0)
        assert await billing.jobs.of(ADDRESS, 10) == []

    asyncio.run(scenario())


def test_a_job_that_runs_again_ends_with_the_outcome_that_was_fixed_first(
    redis_url: str,
) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept()
        first = await billing.end(job, RUN)

        other = JobRun(9, FinishReason.LENGTH, {0: {"b": 1}})
        again = await billing.settlement.settle(job, other)

        assert again == first
        assert await billing.balances() == (1_000 - 80, 0)

    asyncio.run(scenario())


def test_a_quote_equals_the_reservation_and_refuses_what_intake_refuses(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        quote = await billing.intake.quote(MODEL, 4, 10, expected_tokens=3)
        job = await billing.accept(prompt_tokens=4, max_tokens=10)

        assert quote.max_lamports == job.reserved_lamports == 112
        assert (quote.expected_tokens, quote.expected_lamports) == (3, 2 * 4 * (4 + 3))
        assert (await billing.intake.quote(MODEL, 4, 10, None)).expected_lamports == 112
        assert (await billing.intake.quote(MODEL, 4, 10, 99)).expected_lamports == 112
        with pytest.raises(InvalidRequest):
            await billing.intake.quote(MODEL, 33, 10, None)

    asyncio.run(scenario())


@pytest.mark.parametrize("is_written", [False, True])
def test_a_job_whose_caller_was_refused_while_redis_was_away_does_not_run(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        submit = billing.jobs.submit

        async def no_answer(job: Job, *_: str) -> None:
            if is_written:
                await submit(job)
            raise Unavailable("Redis did not answer")

        monkeypatch.setattr(billing.jobs, "submit", no_answer)
        with pytest.raises(Unavailable):
            await billing.accept()
        await asyncio.gather(*billing.intake._going_on)

        record = await billing.jobs.get("job-0")
        assert (record is not None and record.cancelled) == is_written
        assert await billing.balances() == ((888, 112) if is_written else (1_000, 0))
        if not is_written:
            with pytest.raises(Unavailable, match="too long"):
                await submit(builders.job("job-0", address=ADDRESS))

    asyncio.run(scenario())


async def jobs_lost(billing: Billing) -> None:
    """Have Redis lose what it has of jobs."""
    keys = [key async for key in billing.jobs._redis.scan_iter("azu:job*")]
    await billing.jobs._redis.delete(*keys)


def test_a_job_that_redis_lost_after_its_end_ends_as_the_books_have_it(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept()
        outcome = await billing.end(job, RUN)
        await jobs_lost(billing)

        assert [event async for event in billing.jobs.events(job.job_id)] == [outcome]
        await billing.settlement.lose(job)
        assert await billing.balances() == (920, 0)

    asyncio.run(scenario())


def test_a_job_that_redis_lost_before_its_end_costs_nothing(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept()
        await billing.deliver(job, 6)
        await jobs_lost(billing)
        with pytest.raises(NotFound):
            await billing.settlement.settle(job, RUN)
        await billing.settlement.lose(job)

        [lost] = [event async for event in billing.jobs.events(job.job_id)]
        assert isinstance(lost, JobOutcome)
        assert (lost.state, lost.receipt.charged_lamports) == (JobState.FAILED, 0)
        assert lost.error
        assert lost.error["code"] == "job_lost"
        assert await billing.balances() == (1_000, 0)

    asyncio.run(scenario())


def test_a_record_that_cannot_be_read_keeps_no_reservation_of_its_job_or_of_another(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        for _ in range(3):
            await billing.accept()
        await jobs_lost(billing)
        await billing.jobs._redis.hset(job_key("job-1"), "job", "no record")
        billing.books._now_ms = lambda: wall_clock_ms() + TERMS.reservation_ttl_ms
        await billing.settlement.give_back()

        assert await billing.balances() == (1_000, 0)

    asyncio.run(scenario())


def test_a_reservation_that_the_books_do_not_end_keeps_no_other(redis_url: str) -> None:
    class Odd(Bookkeeper):
        async def expire(self, job_id: str) -> None:
            if job_id == "job-0":
                raise ZeroDivisionError
            await super().expire(job_id)

    async def scenario() -> None:
        billing = Billing(redis_url, Odd)
        await billing.deposit(1_000)
        for _ in range(3):
            await billing.accept()
        await jobs_lost(billing)
        billing.books._now_ms = lambda: wall_clock_ms() + TERMS.reservation_ttl_ms
        await billing.settlement.give_back()

        assert await billing.books.overdue() == ("job-0",)

    asyncio.run(scenario())


@pytest.mark.parametrize("delivered", [0, 5, 6])
def test_a_job_whose_outcome_redis_lost_gets_it_back_once_no_charged_token_is_missing(
    redis_url: str, delivered: int
) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        job = await billing.accept()
        assert not await billing.settlement.take_back(job), "it has not ended"
        outcome = await billing.end(job, RUN)
        await jobs_lost(billing)
        await billing.jobs.submit(job)
        await billing.deliver(job, delivered)

        assert await billing.settlement.take_back(job) == (delivered == 6)
        # The missing tokens are computed again, and nothing more is charged.
        await billing.jobs.append([(job.job_id, TokenEvent(delivered, (7,) * (6 - delivered)))])
        other = JobRun(9, FinishReason.LENGTH, {0: {"b": 1}})
        assert await billing.settlement.settle(job, other) == outcome
        record = await billing.jobs.get(job.job_id)
        assert record is not None
        assert record.outcome == outcome
        assert await billing.balances() == (920, 0)

    asyncio.run(scenario())
