"""A job runs as sequences to its end, its tokens written, whatever else happens to it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from tokenizers import Tokenizer, decoders, models

from azu.engine.canary import TEXTS as CANARY_TEXTS
from azu.engine.expert_counts import Received
from azu.engine.opening import draw_key
from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import SchedulerConfig
from azu.engine.text import TextDecoder
from azu.engine.timing import PipelineMetrics
from azu.errors import NotFound, NumericsError, Unavailable, WorkerLost
from azu.jobs import job_runner
from azu.jobs.job_runner import JobRunner
from azu.jobs.record import job_key, tokens_key
from azu.jobs.redis import RedisJobs
from azu.metrics import Meter
from azu.protocol.job import PLATFORM_NODE, FinishReason, Job, TokenEvent
from azu.protocol.phase import queued, reading
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import ExpertWork, SampledToken, SequenceFault, StepBatch, StepResult
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Topology
from azu.supervision import Supervisor, end_process
from azu.units import MIB
from tests.builders import job, structure, topology
from tests.jobs.endings import tokens
from tests.redis_server import start_redis

Scenario = Callable[[RedisJobs], Awaitable[None]]
VOCABULARY = {"a": 5, "b": 6, "c": 7}
STOP = SamplingParams(max_tokens=9, stop=("bc",))


@dataclass
class Pipeline:
    """A runner whose stages the test plays: every step that is sent waits in `sent` until it is answered."""

    jobs: RedisJobs
    sent: list[StepBatch] = field(default_factory=list)
    model: Structure = field(default_factory=lambda: structure(4))
    places: Topology = field(default_factory=lambda: topology({"a": (0, 4)}))
    received: Received | None = None  # what its only expert set says that it got
    max_running: int = 64

    def __post_init__(self) -> None:
        self.engine = EnginePipeline(
            self.model, self.places, SchedulerConfig(64, 4, max_running=self.max_running), (2,)
        )
        decoder = Tokenizer(models.WordLevel(VOCABULARY, unk_token="a"))
        decoder.decoder = decoders.Fuse()
        metrics = PipelineMetrics("test/model", 64, Meter())
        self.runner = JobRunner(
            self.engine, self.jobs, TextDecoder(decoder), metrics, self.send, self.ask_expert_sets
        )
        self.supervisor = Supervisor("test", Meter(), end_process)
        self.supervisor.start("tokens", self.runner.write)

    def send(self) -> None:
        while self.runner.takes_tokens and (batch := self.engine.next_batch()) is not None:
            self.sent.append(batch)

    async def ask_expert_sets(self) -> None:
        reported = self.engine.take_reported()
        self.engine.compare(reported, {} if self.received is None else {0: self.received})

    async def answer(
        self, token_id: int, *faults: SequenceFault, work: tuple[ExpertWork, ...] = (), patience_s: float = 10
    ) -> None:
        """Answer the oldest step with one token for each sequence that samples and does not fail."""
        async with asyncio.timeout(patience_s):
            while not self.sent:
                await asyncio.sleep(0)
        batch = self.sent.pop(0)
        failed = {fault.sequence_id for fault in faults}
        sampled = [one.sequence_id for one in batch.slices if one.sample and one.sequence_id not in failed]
        tokens = tuple(SampledToken(sequence_id, token_id) for sequence_id in sampled)
        self.runner.complete(StepResult(batch.epoch, batch.step, batch.micro_batch, tokens, faults, work))

    async def answer_all(self, token_id: int) -> None:
        """Answer every step."""
        while True:
            await self.answer(token_id)

    async def begin(self, wanted: Job) -> "asyncio.Task[object]":
        running = asyncio.create_task(self.runner.run(wanted))
        while wanted.job_id not in {active.job.job_id for active, _ in self.runner._by_sequence.values()}:
            await asyncio.sleep(0)
        return running


@pytest.fixture
def play(run_scenario: Callable[[Scenario], None]) -> Callable[[Callable[[Pipeline], Awaitable[None]]], None]:
    """Run a scenario with a runner whose job "job-1" was submitted."""

    def run(scenario: Callable[[Pipeline], Awaitable[None]], **given: int) -> None:
        async def with_runner(jobs: RedisJobs) -> None:
            pipeline = Pipeline(jobs, **given)
            try:
                await scenario(pipeline)
            finally:
                await pipeline.supervisor.stop()

        run_scenario(with_runner)

    return run


def test_a_job_ends_with_its_tokens_written_and_its_work_counted(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        wanted = job(max_tokens=2)
        await pipeline.jobs.submit(wanted)
        running = await pipeline.begin(wanted)
        await pipeline.answer(5)
        await pipeline.answer(6)
        run = await running

        assert (run.completion_tokens, run.finish_reason) == (2, FinishReason.LENGTH)
        assert set(run.work) == set(range(4))
        assert await tokens(pipeline.jobs, "job-1") == (5, 6)
        assert pipeline.runner.job_ids == frozenset()

    play(scenario)


def test_what_an_expert_set_did_not_get_is_the_platforms(run_scenario) -> None:
    sets = (ExpertSet(0, "b", {1: (0, 1, 2, 3)}, 0),)

    async def scenario(jobs: RedisJobs) -> None:
        places = replace(topology({"a": (0, 4)}), expert_sets=sets)
        pipeline = Pipeline(jobs, model=structure(4, moe_layers={1: 4}), places=places)
        wanted = job(max_tokens=1)
        await jobs.submit(wanted)
        running = await pipeline.begin(wanted)
        pipeline.received = {1: {1: 6}}
        await pipeline.answer(5, work=(ExpertWork(1, 0, {1: 8}),))
        expert_bytes = MIB
        assert await running == await pipeline.runner.run(wanted)
        work = (await running).work[1]

        assert work["b"] == 6 * expert_bytes
        assert work[PLATFORM_NODE] == 2 * expert_bytes
        await pipeline.supervisor.stop()

    run_scenario(scenario)


def test_a_canary_runs_without_a_job_and_ends_with_the_pipeline(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        asking = asyncio.create_task(pipeline.runner.canary())
        await asyncio.sleep(0)
        looked = pipeline.runner.look(0.0)
        assert (looked.moved, pipeline.runner.job_ids) == ({}, frozenset())
        assert len(pipeline.sent[0].slices) == len(CANARY_TEXTS)
        pipeline.runner.fail(WorkerLost("the pipeline is given up"))

        with pytest.raises(WorkerLost, match="given up"):
            await asking
        assert pipeline.engine.num_sequences == 0

    play(scenario)


def test_a_second_call_gets_the_answer_of_the_first_even_after_the_end(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        wanted = job(max_tokens=1)
        await pipeline.jobs.submit(wanted)
        first = await pipeline.begin(wanted)
        second = asyncio.create_task(pipeline.runner.run(wanted))
        await pipeline.answer(5)

        assert await first == await second == await pipeline.runner.run(wanted)
        assert pipeline.sent == [], "it ran once"

    play(scenario)


def test_a_job_goes_on_after_the_tokens_that_an_earlier_pipeline_wrote(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        wanted = job(max_tokens=3)
        await pipeline.jobs.submit(wanted)
        await pipeline.jobs.append([("job-1", TokenEvent(0, (7,)))])
        running = await pipeline.begin(wanted)
        await pipeline.answer(5)
        await pipeline.answer(6)
        run = await running

        assert run.completion_tokens == 3
        assert await tokens(pipeline.jobs, "job-1") == (7, 5, 6)

    play(scenario)


def test_each_choice_is_a_sequence_with_a_seed_of_its_own_and_its_index(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        wanted = job(sampling=SamplingParams(max_tokens=1, temperature=1.0, seed=3), choices=2)
        await pipeline.jobs.submit(wanted)
        running = await pipeline.begin(wanted)
        opened = []
        while pipeline.runner.job_ids:
            opened += [one.draw_key for one in pipeline.sent[0].opened]
            await pipeline.answer(5)
            await asyncio.sleep(0.01)
        run = await running

        first, second = opened
        prompt, seed = wanted.prompt_token_ids, wanted.sampling.seed
        assert first == draw_key(prompt, seed)
        assert second not in (first, draw_key(prompt, seed + 1)), "the next seed's first choice is another"
        assert run.completion_tokens == 2
        assert await tokens(pipeline.jobs, "job-1", 0) == await tokens(pipeline.jobs, "job-1", 1) == (5,)

    play(scenario)


def test_a_stop_string_ends_a_job(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        wanted = replace(job(), sampling=STOP, prompt_token_ids=(5, 5))
        await pipeline.jobs.submit(wanted)
        running = await pipeline.begin(wanted)
        for token_id in (6, 5, 6, 7):
            await pipeline.answer(token_id)
        run = await running

        assert (run.completion_tokens, run.finish_reason) == (4, FinishReason.STOP)

    play(scenario)


def test_a_cancelled_job_keeps_what_was_delivered_and_is_no_error(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        wanted = job()
        await pipeline.jobs.submit(wanted)
        running = await pipeline.begin(wanted)
        await pipeline.answer(5)
        while await tokens(pipeline.jobs, "job-1") != (5,):
            await asyncio.sleep(0)
        pipeline.runner.cancel("job-1")
        run = await running

        assert (run.completion_tokens, run.finish_reason, run.error) == (1, FinishReason.CANCELLED, None)
        pipeline.runner.cancel("job-1")
        pipeline.runner.cancel("stranger")

    play(scenario)


def test_one_job_is_ended_with_an_error_and_what_was_delivered_and_the_others_go_on(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        jobs = [job(name) for name in ("good", "bad")]
        running = {}
        for one in jobs:
            await pipeline.jobs.submit(one)
            running[one.job_id] = await pipeline.begin(one)
        while pipeline.engine.num_sequences < 2:
            await asyncio.sleep(0)
        for _ in range(4):
            await pipeline.answer(5)
        pipeline.engine.suspend()
        under_way = pipeline.runner.under_way
        assert set(under_way) == {("good", 0), ("bad", 0)}
        assert len(pipeline.runner.sequences_of({("bad", 0), ("stranger", 0)})) == 1

        pipeline.runner.end("bad", WorkerLost("it kills"))
        ended = await running["bad"]
        assert isinstance(ended.error, WorkerLost)
        assert ended.finish_reason is FinishReason.ERROR
        assert ended.completion_tokens > 0
        assert pipeline.runner.job_ids == {"good"}

    play(scenario)


def test_a_failure_ends_every_job_with_its_error_and_refuses_later_ones(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        fault = WorkerLost("the model lost a worker")
        for name in ("job-1", "job-2"):
            await pipeline.jobs.submit(job(name))
        running = await pipeline.begin(job())
        pipeline.runner.fail(fault)

        for run in (await running, await pipeline.runner.run(job("job-2"))):
            assert (run.finish_reason, run.error) == (FinishReason.ERROR, fault)

    play(scenario)


def test_a_job_that_cannot_begin_raises_and_may_be_tried_again(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        large = replace(job(), prompt_token_ids=(5,) * 10_000)
        await pipeline.jobs.submit(large)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await pipeline.runner.run(large)
        assert pipeline.runner.job_ids == frozenset()

    play(scenario)


def test_a_choice_that_fails_ends_its_job_with_its_error_and_what_was_delivered(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        wanted = replace(job(max_tokens=9), choices=2)
        for one in (wanted, job("job-2", max_tokens=3)):
            await pipeline.jobs.submit(one)
        running, other = await pipeline.begin(wanted), await pipeline.begin(job("job-2", max_tokens=3))
        while await tokens(pipeline.jobs, "job-1", 1) == ():
            await pipeline.answer(5)
            await asyncio.sleep(0.01)
        delivered = sum([len(await tokens(pipeline.jobs, "job-1", choice)) for choice in range(2)])
        fault = SequenceFault(2, "numerics_error", "values that are not finite", node_id="a", layer=3)
        await pipeline.answer(6, fault)
        run = await running
        written = sum([len(await tokens(pipeline.jobs, "job-1", choice)) for choice in range(2)])

        assert isinstance(run.error, NumericsError)
        assert (run.error.message, run.error.node_id, run.error.layer) == (fault.message, "a", 3)
        assert (run.finish_reason, run.completion_tokens) == (FinishReason.ERROR, written)
        assert delivered <= written < delivered + 3
        assert set(run.work) == set(range(4)), "the workers are paid for what was delivered"
        while pipeline.engine.num_sequences:
            await pipeline.answer(6)
        assert (await other).finish_reason is FinishReason.LENGTH

    play(scenario)


@pytest.mark.parametrize("code", ["rate_limited", "invalid_api_key", "insufficient_balance", "made_up"])
def test_a_worker_does_not_choose_the_class_of_an_error(play, code: str) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        await pipeline.jobs.submit(job("job-2", max_tokens=3))
        running = await pipeline.begin(job("job-2", max_tokens=3))
        await pipeline.answer(5, SequenceFault(1, code, "no"))
        run = await running

        assert run.error is not None
        assert (run.error.status, run.error.code) == (500, "internal_error")

    play(scenario)


def test_stop_strings_that_raise_end_their_job_now_or_when_it_is_resumed(
    play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        raise ValueError("no text")

    monkeypatch.setattr(job_runner.TextDecoder, "completion", lambda *_: SimpleNamespace(ends_with=refuse))

    async def scenario(pipeline: Pipeline) -> None:
        for name in ("job-1", "job-2"):
            await pipeline.jobs.submit(replace(job(name), sampling=STOP))
        await pipeline.jobs.append([("job-2", TokenEvent(0, (7,)))])
        running = await pipeline.begin(replace(job(), sampling=STOP))
        await pipeline.answer(5)
        runs = [await running, await pipeline.runner.run(replace(job("job-2"), sampling=STOP))]

        assert [(run.completion_tokens, run.finish_reason) for run in runs] == [
            (0, FinishReason.ERROR),
            (1, FinishReason.ERROR),
        ]
        assert {run.error.code for run in runs if run.error} == {"internal_error"}
        assert pipeline.engine.num_free_blocks == 64

    play(scenario)


def test_what_was_taken_is_written_by_the_next_call_after_one_that_raised(
    play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        append = pipeline.jobs.append

        async def once(*_: object) -> None:
            monkeypatch.setattr(pipeline.jobs, "append", append)
            raise ZeroDivisionError

        monkeypatch.setattr(pipeline.jobs, "append", once)
        await pipeline.jobs.submit(job(max_tokens=1))
        running = await pipeline.begin(job(max_tokens=1))
        await pipeline.answer(5)

        assert (await running).completion_tokens == 1
        assert await tokens(pipeline.jobs, "job-1") == (5,)

    play(scenario)


def test_tokens_whose_count_raises_are_written_all_the_same(play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        def once(*_: object) -> None:
            monkeypatch.undo()
            raise ZeroDivisionError

        monkeypatch.setattr(pipeline.runner._metrics, "record_tokens", once)
        await pipeline.jobs.submit(job(max_tokens=1))
        running = await pipeline.begin(job(max_tokens=1))
        await pipeline.answer(5)

        assert (await running).completion_tokens == 1
        assert await tokens(pipeline.jobs, "job-1") == (5,)

    play(scenario)


def test_only_a_job_whose_sequences_all_wait_in_the_engine_has_no_room(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        for job_id in ("job-1", "job-2", "job-3"):
            await pipeline.jobs.submit(job(job_id))
            await pipeline.begin(job(job_id))
        # Its end in the engine is lost on the way, as by an exception.
        lost = next(
            key for key, (one, _) in pipeline.runner._by_sequence.items() if one.job.job_id == "job-3"
        )
        pipeline.engine.cancel(lost)

        look = pipeline.runner.look(0.1)
        assert look.moved.keys() == {"job-1", "job-2", "job-3"}
        assert look.no_room == {"job-2"}

    play(scenario, max_running=1)


def test_only_so_many_ended_jobs_are_kept(play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_runner, "_KEPT_JOBS", 2)

    async def scenario(pipeline: Pipeline) -> None:
        for number in range(4):
            wanted = job(f"job-{number}", max_tokens=1)
            await pipeline.jobs.submit(wanted)
            running = await pipeline.begin(wanted)
            await pipeline.answer(5)
            await running

        assert list(pipeline.runner._by_job) == ["job-2", "job-3"]

    play(scenario)


def test_a_long_job_keeps_none_of_those_that_ended_beside_it(play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_runner, "_KEPT_JOBS", 2)

    async def scenario(pipeline: Pipeline) -> None:
        long = job("job-long", max_tokens=200)
        await pipeline.jobs.submit(long)
        running = await pipeline.begin(long)
        for number in range(4):
            wanted = job(f"job-{number}", max_tokens=1)
            await pipeline.jobs.submit(wanted)
            short = await pipeline.begin(wanted)
            await pipeline.answer(5)
            while not short.done():
                if pipeline.sent:
                    await pipeline.answer(5)
                await asyncio.wait({short}, timeout=0.01)
        assert list(pipeline.runner._by_job) == ["job-long", "job-2", "job-3"]
        pipeline.runner.cancel("job-long")
        await running
        assert list(pipeline.runner._by_job) == ["job-3", "job-long"]

    play(scenario)


def test_an_engine_computes_on_while_redis_is_away_up_to_a_bound_and_the_tokens_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = f"| tokens that are computed while Redis is away | {job_runner._MAX_UNWRITTEN_STEPS} steps of"
    assert told in Path("docs/operations.md").read_text()
    monkeypatch.setattr(job_runner, "_MAX_UNWRITTEN_STEPS", 3)
    server = start_redis(tmp_path)
    admin = redis.Redis(port=server.port)

    async def scenario() -> None:
        pipeline = Pipeline(RedisJobs.from_url(server.url))
        wanted = job(max_tokens=9)
        await pipeline.jobs.submit(wanted)
        running = await pipeline.begin(wanted)
        admin.replicaof("127.0.0.1", 1)
        computed = 0
        with suppress(TimeoutError):
            while True:
                await pipeline.answer(5 + computed, patience_s=0.2)
                computed += 1
        assert computed == 4, "the bound, and the step that was on its way"
        pipeline.send()
        assert pipeline.sent == [], "those that are being written count too"
        admin.replicaof("NO", "ONE")
        for token_id in range(5 + computed, 14):
            await pipeline.answer(token_id)

        assert (await running).completion_tokens == 9
        assert await tokens(pipeline.jobs, "job-1") == tuple(range(5, 14))
        await pipeline.supervisor.stop()

    try:
        asyncio.run(asyncio.wait_for(scenario(), 30))
    finally:
        server.kill()


def test_a_job_whose_last_tokens_redis_lost_is_computed_from_there_again(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        wanted, other = job(max_tokens=40), job("job-2", max_tokens=40)
        for one in (wanted, other):
            await pipeline.jobs.submit(one)
        running, beside = await pipeline.begin(wanted), asyncio.create_task(pipeline.runner.run(other))
        while len(await tokens(pipeline.jobs, "job-1")) < 2:
            await pipeline.answer(5)
        await pipeline.jobs._redis.hset(job_key("job-1"), "delivered", 0)
        await pipeline.jobs._redis.delete(tokens_key("job-1"))
        answering = asyncio.create_task(pipeline.answer_all(7))

        assert (await running).completion_tokens == 40
        assert await tokens(pipeline.jobs, "job-1") == (7,) * 40
        assert (await beside).completion_tokens == 40
        answering.cancel()

    play(scenario)


def test_a_job_that_redis_lost_ends_and_the_others_go_on(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        wanted, other = job(max_tokens=4), job("job-2", max_tokens=4)
        for one in (wanted, other):
            await pipeline.jobs.submit(one)
        running, beside = await pipeline.begin(wanted), asyncio.create_task(pipeline.runner.run(other))
        await pipeline.answer(5)
        await pipeline.jobs._redis.delete(job_key("job-1"))
        answering = asyncio.create_task(pipeline.answer_all(6))

        with pytest.raises(NotFound):
            await running
        assert (await beside).completion_tokens == 4
        answering.cancel()

    play(scenario)


def test_a_job_reads_its_prompt_or_waits_behind_those_that_came_before_it(play) -> None:
    async def scenario(pipeline: Pipeline) -> None:
        long = job("job-1", max_tokens=200)
        for job_id in ("job-1", "job-2", "job-3"):
            await pipeline.jobs.submit(replace(long, job_id=job_id))
        running = [
            await pipeline.begin(replace(long, job_id=job_id)) for job_id in ("job-1", "job-2", "job-3")
        ]
        assert pipeline.runner.look(0.1).phases == {
            "job-1": reading(0, 4), "job-2": queued(0), "job-3": queued(1),
        }  # fmt: skip
        await pipeline.answer(5)
        assert pipeline.runner.look(0.1).phases == {"job-2": queued(0), "job-3": queued(1)}
        for one in running:
            one.cancel()

    play(scenario, max_running=1)
