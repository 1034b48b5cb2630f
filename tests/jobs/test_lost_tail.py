"""The jobs' Redis forgets its last second, at every point: each job ends as the books have it, paid once."""

import asyncio
from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from azu.config.network import RetryPolicy
from azu.errors import NotFound, WorkerLost
from azu.jobs import dispatch
from azu.jobs.departures import Departures
from azu.jobs.dispatch import Dispatcher
from azu.jobs.draining import Draining
from azu.jobs.in_flight_limit import InFlightLimit
from azu.jobs.intake import Intake, JobLimits
from azu.jobs.redis import RedisJobs
from azu.jobs.settlement import Settlement
from azu.metrics import Meter
from azu.protocol.job import FinishReason, Job, JobOutcome, JobRun, TokenEvent
from azu.protocol.sampling import SamplingParams
from azu.redis_client import connect_redis, retry_until_available
from azu.supervision import Supervisor
from tests.builders import OwnPipeline
from tests.jobs.test_settlement import ADDRESS, MODEL
from tests.money.accounts import BEARER, fund, signed_key
from tests.money.serving import TERMS, ServedBooks, serving
from tests.redis_server import Rewindable

PATIENCE = RetryPolicy(first_s=1, longest_s=1, budget_s=1, job_s=10**12)
TOKENS = 3
# 4 prompt tokens and the completion, over 4 layers.
CHARGED = 2 * 4 * (4 + TOKENS)
WRITES = ("submit", "take", "set_state", "append", "finish", "done")


@dataclass(eq=False)
class Model(OwnPipeline):
    """Writes the same tokens of a job in every process, from those on that are written."""

    jobs: RedisJobs
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, job: Job) -> JobRun:
        known = (await self.jobs.progress(job)).delivered
        while known < TOKENS:
            event = TokenEvent(known, (known + 7,))
            if await retry_until_available(lambda event=event: self.jobs.append([(job.job_id, event)])):
                known = (await self.jobs.progress(job)).delivered
                continue
            known += 1
            if known == 2:
                self.begun.set()
                await self.may_go_on.wait()
        return JobRun(TOKENS, FinishReason.LENGTH, {layer: {"a": 1} for layer in range(4)})

    async def ensure(self, model_id: str, revision: str, job_id: str) -> "Model":
        return self

    phase = None

    def keep_jobs(self, job_ids: Container[str]) -> tuple[()]:
        """Return nothing: no job is left behind here."""
        return ()

    async def phase_of(self, model_id: str, revision: str) -> None:
        """Return nothing: it is up."""

    async def look(self) -> None:
        raise WorkerLost("there is no pipeline to look at")

    async def cancel(self, job_id: str) -> None:
        pass

    def let_go(self, job_id: str) -> None:
        pass


@dataclass
class Network:
    """Intake and a scheduler over a job store that can be rewound; `positions` are those after each write."""

    store: Rewindable
    served: ServedBooks
    positions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.books = self.served.client()
        self.jobs = RedisJobs(connect_redis(self.store.server.url), self.books.ended)
        self.model = Model(self.jobs)
        for name in WRITES:
            setattr(self.jobs, name, self._noted(getattr(self.jobs, name)))
        self.positions.append(self.store.position())

    def _noted(self, write: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def noted(*values: Any, **named: Any) -> Any:
            answer = await write(*values, **named)
            self.positions.append(self.store.position())
            return answer

        return noted

    async def accept(self) -> Job:
        await fund(self.books, 1_000)
        await self.books.open_key(signed_key())
        limits = JobLimits(max_prompt_tokens=32, max_completion_tokens=40)
        limit = InFlightLimit(connect_redis(self.store.server.url), self.jobs, 100)
        departures = Departures(self.jobs._redis, kept_s=600)
        intake = Intake(
            self.books,
            self.jobs,
            limit,
            limits,
            departures,
            Draining(self.jobs._redis, self.jobs),
            now_ms=lambda: 1_000,
            new_job_id=lambda: "job-1",
        )
        sampling, key = SamplingParams(max_tokens=10), await self.books.key(BEARER)
        return await intake.accept(key, BEARER, MODEL, (1, 2, 3, 4), sampling)

    def scheduler(self) -> "asyncio.Task[None]":
        """Start a scheduler, which first takes over what an earlier one had taken."""
        dispatcher = Dispatcher(
            self.jobs, self.model, Settlement(self.books, self.jobs), consumer="scheduler",
            patience=PATIENCE, supervisor=Supervisor("test", Meter(), lambda: None),
        )  # fmt: skip
        return asyncio.create_task(dispatcher.run())

    async def outcome(self) -> JobOutcome | None:
        """Wait until the job's end is known to its reader; None if nothing was ever reserved or written."""
        while True:
            try:
                async with asyncio.timeout(15):
                    return [event async for event in self.jobs.events("job-1")][-1]
            except NotFound:
                # It was never written, or its end is not known yet.
                await Settlement(self.books, self.jobs).give_back()
                await asyncio.sleep(0.02)

    async def check(self, *, has_run: bool) -> None:
        """The reader, the record and the books agree; the job was charged once, or not at all."""
        outcome = await self.outcome()
        assert outcome == await self.books.ended("job-1")
        assert outcome is not None
        charged = outcome.receipt.charged_lamports
        assert charged in ((CHARGED,) if has_run else (0, CHARGED))
        record = await self.jobs.get("job-1")
        assert record is None or record.outcome == outcome
        if record is not None and charged:
            assert await self.jobs.tokens("job-1") == ((7, 8, 9),), "what is charged can be read"
        balance = await self.books.balance(ADDRESS)
        assert (balance.available_lamports, balance.reserved_lamports) == (1_000 - charged, 0)
        assert (await self.books.audit()).agrees


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FAULT_PAUSE_S", 0.01)
    monkeypatch.setattr(dispatch, "_TAKE_BLOCK_MS", 20)
    monkeypatch.setattr("azu.jobs.token_reader._QUIET_S", 0.05)


async def stopped(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def play(folder: Path, redis_url: str, scenario: Callable[[Network], Awaitable[int]]) -> int:
    """Play a scenario in a new network; return how many writes it made."""
    store = Rewindable.start(folder)

    async def run() -> int:
        connections = connect_redis(redis_url)
        await connections.flushdb()
        await connections.aclose()
        terms = {"reservation_ttl_ms": 1}
        async with serving(redis_url, terms=type(TERMS)(**{**_facts(), **terms})) as served:
            return await asyncio.wait_for(scenario(Network(store, served)), 60)

    try:
        return asyncio.run(run())
    finally:
        store.server.kill()


def _facts() -> dict[str, Any]:
    return {name: getattr(TERMS, name) for name in TERMS.__dataclass_fields__}


@pytest.mark.prove
def test_after_a_jobs_end(redis_url: str, tmp_path: Path) -> None:
    at = 0
    while True:

        async def scenario(network: Network, at: int = at) -> int:
            network.model.may_go_on.set()
            job = await network.accept()
            first = network.scheduler()
            assert isinstance([event async for event in network.jobs.events(job.job_id)][-1], JobOutcome)
            while (record := await network.jobs.get(job.job_id)) is None or record.outcome is None:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # until it is out of the queue
            await stopped(first)
            writes = sorted(set(network.positions))
            if at < len(writes):
                await asyncio.to_thread(network.store.rewind, writes[-1 - at])
                second = network.scheduler()
                await network.check(has_run=True)
                await stopped(second)
            return len(writes)

        if play(tmp_path / f"redis-{at}", redis_url, scenario) <= at:
            break
        at += 1
    assert at >= 8, "every write was the last one once"


@pytest.mark.prove
def test_while_a_job_runs(redis_url: str, tmp_path: Path) -> None:
    at = 0
    while True:

        async def scenario(network: Network, at: int = at) -> int:
            await network.accept()
            running = network.scheduler()
            await network.model.begun.wait()
            writes = sorted(set(network.positions))
            if at < len(writes):
                await asyncio.to_thread(network.store.rewind, writes[-1 - at])
                network.model.may_go_on.set()
                await network.check(has_run=False)
            await stopped(running)
            return len(writes)

        if play(tmp_path / f"redis-{at}", redis_url, scenario) <= at:
            break
        at += 1
    assert at >= 5, "every write was the last one once"
