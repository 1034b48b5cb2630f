"""A job is written once, taken until it is done, and keeps every token it produced exactly once."""

import asyncio
import math
from dataclasses import replace

import pytest

from azu.errors import InternalError, InvalidRequest, NotFound, Unavailable
from azu.jobs import redis, token_reader
from azu.jobs.record import GROUP, QUEUE, ChoiceProgress, job_key, tokens_key
from azu.jobs.redis import TOKENS_KEPT_S, RedisJobs
from azu.money.ledger.durability import DURABLE_CONFIG
from azu.protocol.job import FinishReason, JobOutcome, JobState, TokenEvent
from azu.protocol.phase import JobPhase, answering, reading
from azu.protocol.sampling import SamplingParams
from tests.builders import ALICE, BOB, job
from tests.jobs.endings import outcome, tokens
from tests.jobs.outages import away_for
from tests.redis_server import start_redis

LATER_MS = 60_000


async def taken(jobs: RedisJobs, consumer: str, claim_idle_ms: int = LATER_MS) -> list[str]:
    return [record.job.job_id for record in await jobs.take(consumer, 1, claim_idle_ms)]


async def make_idle(jobs: RedisJobs, job_id: str, consumer: str, idle_ms: int) -> None:
    entry_id = await jobs._redis.hget(job_key(job_id), "queue_id")
    await jobs._redis.xclaim(QUEUE, GROUP, consumer, 0, [entry_id], idle=idle_ms)


async def streamed(jobs: RedisJobs, job_id: str, after: int = 0) -> list[TokenEvent | JobOutcome]:
    return [event async for event in jobs.events(job_id, after)]


def test_a_submitted_job_comes_back_as_it_was(run_scenario) -> None:
    sampling = SamplingParams(
        max_tokens=7, temperature=0.3, logit_bias={5: -math.pi}, stop=("\n", "é"), seed=2**63
    )
    written = job(sampling=sampling, prompt_token_ids=tuple(range(5_000)))

    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(written)
        record = await jobs.get("job-1")

        assert record is not None
        assert record.job == written
        assert (record.state, record.outcome, record.attempts) == (JobState.QUEUED, None, 0)
        assert await jobs.get("job-2") is None

    run_scenario(scenario)


def test_submitting_a_job_again_changes_nothing(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.set_state("job-1", JobState.RUNNING)
        await jobs.submit(job(max_tokens=99))

        record = await jobs.get("job-1")
        assert record is not None
        assert (record.state, record.job.sampling.max_tokens) == (JobState.RUNNING, 10)
        assert await taken(jobs, "one") == ["job-1"]

    run_scenario(scenario)


def test_each_job_goes_to_one_consumer(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(150):
            await jobs.submit(job(f"job-{n}"))
        got: list[str] = []
        while batch := [*await taken(jobs, "one"), *await taken(jobs, "two")]:
            got += batch

        assert sorted(got) == sorted(f"job-{n}" for n in range(150))

    run_scenario(scenario)


def test_a_waiting_consumer_gets_a_job_as_soon_as_it_is_submitted(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        waiting = asyncio.create_task(jobs.take("one", 5_000, LATER_MS))
        await asyncio.sleep(0.1)
        await jobs.submit(job())

        assert [record.job.job_id for record in await waiting] == ["job-1"]

    run_scenario(scenario)


def test_a_job_of_a_consumer_that_died_is_claimed_by_another(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        assert await taken(jobs, "dead") == ["job-1"]
        assert await taken(jobs, "heir") == []
        await make_idle(jobs, "job-1", "dead", LATER_MS)

        assert await taken(jobs, "heir") == ["job-1"]

    run_scenario(scenario)


def test_an_idle_job_is_found_behind_a_thousand_running_jobs(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(1_000):  # one XAUTOCLAIM examines 640
            await jobs.submit(job(f"job-{n:03}"))
        while await taken(jobs, "busy"):
            pass
        await jobs.submit(job("job-last"))
        assert await taken(jobs, "dead") == ["job-last"]
        await make_idle(jobs, "job-last", "dead", LATER_MS)

        assert await taken(jobs, "heir") == ["job-last"]

    run_scenario(scenario)


def test_a_takeover_returns_every_open_job_at_once(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        names = [f"job-{n:03}" for n in range(150)]
        for name in names:
            await jobs.submit(job(name))
        while await taken(jobs, "dead"):
            pass
        await jobs.submit(job("job-new"))
        await jobs.done("job-007")

        records = await jobs.take_over("heir")

        assert sorted(record.job.job_id for record in records) == sorted(set(names) - {"job-007"})
        assert await taken(jobs, "heir") == ["job-new"]

    run_scenario(scenario)


def test_the_progress_of_a_job_is_its_written_part(run_scenario) -> None:
    two = job(choices=2)
    work = {0: {"node-a": 2**60}, 3: {"node-a": 1, "node-b": 2}}
    ended = TokenEvent(3, (8,), choice=1, finish_reason=FinishReason.STOP, work=work)

    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(two)
        assert (await jobs.progress(two)).choices == (ChoiceProgress(), ChoiceProgress())
        events = [TokenEvent(0, (5, 6), choice=0), TokenEvent(2, (7,), choice=1), ended, ended]
        await jobs.append([("job-1", event) for event in events])

        found = await jobs.progress(two)

        assert found.choices == (ChoiceProgress((5, 6)), ChoiceProgress((7, 8), FinishReason.STOP, work))
        assert (found.delivered, found.cancelled) == (4, False)
        await jobs.cancel("job-1")
        assert (await jobs.progress(two)).cancelled

    run_scenario(scenario)


def test_a_long_stream_is_read_in_parts_between_which_other_tasks_run(run_scenario, monkeypatch) -> None:
    monkeypatch.setattr(redis, "_ENTRIES_AT_ONCE", 3)
    two = job(choices=2, max_tokens=10)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def scenario(jobs: RedisJobs) -> None:
        nonlocal turns
        await jobs.submit(two)
        written = [TokenEvent(index, (index,), choice=index % 2) for index in range(20)]
        await jobs.append([("job-1", event) for event in written])
        even, odd = tuple(range(0, 20, 2)), tuple(range(1, 20, 2))

        beside = asyncio.create_task(others())
        assert await jobs.tokens("job-1", 2) == (even, odd)
        assert turns >= 7
        assert [one.token_ids for one in (await jobs.progress(two)).choices] == [even, odd]
        await jobs.finish("job-1", outcome(completion_tokens=20))
        turns = 0
        *events, last = await streamed(jobs, "job-1", after=2)
        assert turns >= 6
        assert (events, last) == (written[2:], outcome(completion_tokens=20))
        assert await jobs.tokens("job-1", 2) == (even, odd)
        beside.cancel()

    run_scenario(scenario)


def test_a_consumer_that_calls_take_again_keeps_its_jobs(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        assert await taken(jobs, "holder") == ["job-1"]
        await make_idle(jobs, "job-1", "holder", LATER_MS // 2)
        assert await taken(jobs, "rival") == []

        assert await taken(jobs, "holder") == ["job-1"]
        (pending,) = await jobs._redis.xpending_range(QUEUE, GROUP, "-", "+", 1)
        assert pending["consumer"] == "holder"
        assert pending["time_since_delivered"] < LATER_MS // 2
        assert await taken(jobs, "holder") == []

    run_scenario(scenario)


def test_a_job_that_is_done_is_never_taken_again(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        assert await taken(jobs, "one") == ["job-1"]
        await jobs.done("job-1")
        await jobs.done("job-1")
        await asyncio.sleep(0.05)

        assert await taken(jobs, "two", 1) == []
        assert await jobs._redis.xlen(QUEUE) == 0

    run_scenario(scenario)


def test_attempts_count_how_often_a_job_began_to_run(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.set_state("job-1", JobState.RUNNING)
        await jobs.set_state("job-1", JobState.QUEUED)
        await jobs.set_state("job-1", JobState.RUNNING)

        record = await jobs.get("job-1")
        assert record is not None
        assert (record.state, record.attempts) == (JobState.RUNNING, 2)
        with pytest.raises(NotFound):
            await jobs.set_state("job-2", JobState.RUNNING)

    run_scenario(scenario)


def test_the_first_outcome_stays(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        first, second = outcome(), outcome(state=JobState.FAILED, finish_reason=FinishReason.ERROR)

        assert await jobs.finish("job-1", first) is True
        assert await jobs.finish("job-1", second) is False
        await jobs.set_state("job-1", JobState.RUNNING)

        record = await jobs.get("job-1")
        assert record is not None
        assert (record.state, record.outcome) == (JobState.DONE, first)
        assert await streamed(jobs, "job-1") == [first]
        with pytest.raises(NotFound):
            await jobs.finish("job-2", outcome("job-2"))

    run_scenario(scenario)


def test_the_jobs_of_an_address_come_newest_first(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(5):
            await jobs.submit(job(f"job-{n}", created_at_ms=1_000 + n))
        await jobs.submit(job("job-of-bob", address=BOB))

        assert [record.job.job_id for record in await jobs.of(ALICE, 3)] == ["job-4", "job-3", "job-2"]
        assert [record.job.job_id for record in await jobs.of(ALICE, 2, "job-3")] == ["job-2", "job-1"]
        assert [*await jobs.of(ALICE, 2, "job-0"), *await jobs.of(ALICE, 2, "job-of-bob")] == []
        assert [record.job.job_id for record in await jobs.of(BOB, 3)] == ["job-of-bob"]

    run_scenario(scenario)


def test_tokens_of_many_jobs_are_written_in_one_call_and_only_once(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job("job-1"))
        await jobs.submit(job("job-2"))
        step = [("job-1", TokenEvent(0, (11, 12))), ("job-2", TokenEvent(0, (21,), (-0.5,)))]
        await jobs.append(step)
        await jobs.append(step)
        await jobs.append([("job-1", TokenEvent(2, (13,)))])

        assert await tokens(jobs, "job-1") == (11, 12, 13)
        assert await tokens(jobs, "job-2") == (21,)
        assert await tokens(jobs, "job-3") == ()

    run_scenario(scenario)


def test_a_step_that_overlaps_another_adds_only_its_new_tokens(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.append([("job-1", TokenEvent(0, (1, 2, 3), (-1.0, -2.0, -3.0)))])
        await jobs.append([("job-1", TokenEvent(1, (2, 3, 4, 5), (-2.0, -3.0, -4.0, -math.inf)))])
        await jobs.finish("job-1", outcome())

        *tokens, _ = await streamed(jobs, "job-1")
        assert tokens == [
            TokenEvent(0, (1, 2, 3), (-1.0, -2.0, -3.0)),
            TokenEvent(3, (4, 5), (-4.0, -math.inf)),
        ]

    run_scenario(scenario)


def test_a_step_that_overlaps_another_keeps_the_alternatives_of_its_new_tokens(run_scenario) -> None:
    first, second, third = ((1, -0.5), (2, -1.5)), (), ((3, -math.inf),)

    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.append([("job-1", TokenEvent(0, (1,), (-0.5,), (first,)))])
        overlapping = TokenEvent(0, (1, 2, 3), (-0.5, -1.0, -2.0), (first, second, third))
        await jobs.append([("job-1", overlapping)])
        await jobs.finish("job-1", outcome())

        *tokens, _ = await streamed(jobs, "job-1")
        assert tokens == [
            TokenEvent(0, (1,), (-0.5,), (first,)),
            TokenEvent(1, (2, 3), (-1.0, -2.0), (second, third)),
        ]

    run_scenario(scenario)


def test_tokens_after_a_gap_are_not_written_and_their_jobs_named(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job("job-1"))
        await jobs.submit(job("job-2"))
        step = [(f"job-{n}", TokenEvent(index, (7,))) for n, index in ((1, 1), (2, 0), (3, 0))]
        assert await jobs.append(step) == {"job-1", "job-3"}

        assert await tokens(jobs, "job-1") == ()
        assert await tokens(jobs, "job-2") == (7,)

    run_scenario(scenario)


def test_a_job_that_has_ended_takes_no_more_tokens(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.append([("job-1", TokenEvent(0, (1,)))])
        await jobs.finish("job-1", outcome())
        await jobs.append([("job-1", TokenEvent(1, (2,)))])

        assert await tokens(jobs, "job-1") == (1,)

    run_scenario(scenario)


@pytest.mark.parametrize("after", range(6))
def test_a_reader_that_comes_back_gets_exactly_the_tokens_that_it_lacks(run_scenario, after: int) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.append([("job-1", TokenEvent(0, (0, 1, 2)))])
        await jobs.append([("job-1", TokenEvent(3, (3, 4)))])
        running = asyncio.create_task(streamed(jobs, "job-1", after))
        await asyncio.sleep(0.05)
        await jobs.finish("job-1", outcome())

        for events in (await running, await streamed(jobs, "job-1", after)):
            *tokens, end = events
            assert end == outcome()
            assert [token for event in tokens for token in event.token_ids] == list(range(after, 5))
            assert [event.index for event in tokens] == sorted({after, *([3] if after < 3 else [])} - {5})

    run_scenario(scenario)


@pytest.mark.parametrize("after", [-1, 3])
def test_an_index_beyond_the_last_token_is_refused(run_scenario, after: int) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.append([("job-1", TokenEvent(0, (1, 2)))])
        with pytest.raises(InvalidRequest) as refused:
            await streamed(jobs, "job-1", after)
        assert refused.value.param == "after"
        with pytest.raises(NotFound):
            await streamed(jobs, "job-2")

    run_scenario(scenario)


def test_a_stream_expires_after_the_outcome_and_the_outcome_stays(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.append([("job-1", TokenEvent(0, (1, 2)))])
        assert await jobs._redis.ttl(tokens_key("job-1")) == -1
        await jobs.finish("job-1", outcome())
        assert TOKENS_KEPT_S - 5 <= await jobs._redis.ttl(tokens_key("job-1")) <= TOKENS_KEPT_S

        await jobs._redis.delete(tokens_key("job-1"))
        assert await streamed(jobs, "job-1") == [outcome()]

    run_scenario(scenario)


def test_a_cancellation_is_recorded_once_and_reaches_later_readers_too(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(3):
            await jobs.submit(job(f"job-{n}"))
        await jobs.finish("job-2", outcome("job-2"))
        for job_id in ("job-0", "job-0", "job-2", "job-unknown"):
            await jobs.cancel(job_id)
        cancelled_ids = jobs.cancellations()
        assert await anext(cancelled_ids) == ("job-0", False)
        waiting = asyncio.ensure_future(anext(cancelled_ids))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await jobs.cancel("job-1")

        assert await asyncio.wait_for(waiting, 30) == ("job-1", False)
        records = [await jobs.get(f"job-{n}") for n in range(3)]
        assert [record is not None and record.cancelled for record in records] == [True, True, False]

    run_scenario(scenario)


def test_a_call_whose_answer_was_lost_can_be_repeated(run_scenario) -> None:
    """Every connection is cut between two calls, as by a broken network."""

    async def scenario(jobs: RedisJobs) -> None:
        written = replace(job(), created_at_ms=5)
        for index in range(5):
            await jobs.submit(written)
            await jobs._redis.client_kill_filter(_type="normal", skipme=True)
            await jobs._redis.connection_pool.disconnect()
            await jobs.append([("job-1", TokenEvent(index, (index,)))])
        assert await tokens(jobs, "job-1") == (0, 1, 2, 3, 4)

    run_scenario(scenario)


@pytest.mark.prove
def test_a_redis_that_does_not_answer_is_unavailable() -> None:
    async def scenario() -> None:
        jobs = RedisJobs.from_url("redis://127.0.0.1:9/0")
        for asked in (jobs.get("job-1"), jobs.submit(job()), jobs.of(ALICE, 1), jobs.cancel("job-1")):
            with pytest.raises(Unavailable):
                await asked

    asyncio.run(scenario())


STREAMS = 300
TOKENS = 8


async def read(jobs: RedisJobs, job_id: str, after: int = 0) -> list[int]:
    events = [event async for event in jobs.events(job_id, after)]
    assert isinstance(events[-1], JobOutcome)
    return [token for event in events[:-1] if isinstance(event, TokenEvent) for token in event.token_ids]


async def connections(jobs: RedisJobs) -> int:
    return len(await jobs._redis.client_list(_type="normal"))


async def until_read(jobs: RedisJobs, followers: int) -> None:
    while len(jobs._reader._followers) < followers:
        await asyncio.sleep(0.001)


def test_hundreds_of_streams_share_one_blocked_read(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        ids = [f"job-{n}" for n in range(STREAMS)]
        connections_before = await connections(jobs)
        for job_id in ids:
            await jobs.submit(job(job_id))
        reading = []
        for job_id in ids:
            reading.append(asyncio.create_task(read(jobs, job_id)))
            await until_read(jobs, len(reading))
        assert await connections(jobs) - connections_before <= 3
        for index in range(TOKENS):
            await jobs.append([(job_id, TokenEvent(index, (index,))) for job_id in ids])
        for job_id in ids:
            await jobs.finish(job_id, outcome(job_id))

        assert await asyncio.gather(*reading) == [list(range(TOKENS))] * STREAMS
        assert not jobs._reader._followers

    run_scenario(scenario)


def test_a_new_follower_gets_its_first_token_while_another_stream_is_quiet(run_scenario, monkeypatch) -> None:
    # A read that is not woken up blocks for longer than the scenario may take.
    monkeypatch.setattr("azu.jobs.token_reader.BLOCK_MS", 60_000)

    async def scenario(jobs: RedisJobs) -> None:
        for n in range(2):
            await jobs.submit(job(f"job-{n}"))
        quiet = jobs.events("job-0")
        waiting = asyncio.ensure_future(anext(quiet))
        await asyncio.sleep(0.1)  # the reader is blocked on the quiet stream now
        first = asyncio.ensure_future(anext(jobs.events("job-1")))
        await asyncio.sleep(0.1)
        await jobs.append([("job-1", TokenEvent(0, (7,)))])

        assert await first == TokenEvent(0, (7,))
        waiting.cancel()

    run_scenario(scenario)


def test_followers_of_one_job_at_different_tokens_each_get_the_rest(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.append([("job-1", TokenEvent(0, (0, 1, 2, 3)))])
        reading = [asyncio.create_task(read(jobs, "job-1", after)) for after in (0, 2, 4, 1)]
        await until_read(jobs, 4)
        await jobs.append([("job-1", TokenEvent(4, (4, 5)))])
        await jobs.finish("job-1", outcome())

        assert await asyncio.gather(*reading) == [list(range(after, 6)) for after in (0, 2, 4, 1)]

    run_scenario(scenario)


def test_a_follower_that_comes_while_a_token_is_read_for_another_lacks_none(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job("job-1"))
        await jobs.append([("job-1", TokenEvent(0, (0, 1, 2, 3)))])
        first = jobs.events("job-1")
        await anext(first)
        waiting = asyncio.ensure_future(anext(first))
        await until_read(jobs, 1)
        wake = jobs._reader._wake_reading_task

        async def after_the_next_token() -> None:
            await jobs.append([("job-1", TokenEvent(4, (4,)))])
            assert await waiting == TokenEvent(4, (4,))
            await wake()

        jobs._reader._wake_reading_task = after_the_next_token
        second = asyncio.create_task(read(jobs, "job-1"))
        await asyncio.wait_for(asyncio.shield(waiting), 30)
        await jobs.finish("job-1", outcome("job-1"))

        assert await second == [0, 1, 2, 3, 4]

    run_scenario(scenario)


def test_a_follower_that_leaves_is_removed_and_the_others_continue(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(2):
            await jobs.submit(job(f"job-{n}"))
        leaving, staying = (asyncio.create_task(read(jobs, f"job-{n}")) for n in range(2))
        await until_read(jobs, 2)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert len(jobs._reader._followers) == 1
        await jobs.append([("job-1", TokenEvent(0, (5,)))])
        await jobs.finish("job-1", outcome("job-1"))

        assert await staying == [5]

    run_scenario(scenario)


def test_reading_continues_after_the_connection_is_cut(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        reading = asyncio.create_task(read(jobs, "job-1"))
        await until_read(jobs, 1)
        for index in range(4):
            await asyncio.sleep(0.05)
            await jobs._redis.client_kill_filter(_type="normal", skipme=True)
            await jobs.append([("job-1", TokenEvent(index, (index,)))])
        await jobs.finish("job-1", outcome())

        assert await reading == [0, 1, 2, 3]

    run_scenario(scenario)


def test_followers_of_a_redis_that_stays_away_raise_instead_of_waiting_for_ever(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("redis", "token_reader"):
        monkeypatch.setattr(f"azu.jobs.{module}.AWAY_S", 0.0)
    server = start_redis(tmp_path)

    async def scenario() -> None:
        jobs = RedisJobs.from_url(server.url)
        await jobs.submit(job())
        reading = asyncio.create_task(read(jobs, "job-1"))
        await until_read(jobs, 1)
        await asyncio.sleep(0.05)
        server.kill()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(reading, 20)

    try:
        asyncio.run(scenario())
    finally:
        server.kill()


def test_a_reader_of_a_job_that_redis_lost_is_told_and_one_that_is_ahead_gets_the_outcome(
    run_scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("azu.jobs.token_reader._QUIET_S", 0.0)
    monkeypatch.setattr("azu.jobs.token_reader.BLOCK_MS", 20)

    async def scenario(jobs: RedisJobs) -> None:
        for n in range(2):
            await jobs.submit(job(f"job-{n}"))
            await jobs.append([(f"job-{n}", TokenEvent(0, (1, 2, 3)))])
        readers = [asyncio.create_task(read(jobs, f"job-{n}")) for n in range(2)]
        while [one.position for one in jobs._reader._followers] != [3, 3]:
            await asyncio.sleep(0.01)
        await jobs._redis.delete(job_key("job-0"), tokens_key("job-0"), tokens_key("job-1"))
        await jobs._redis.hset(job_key("job-1"), "delivered", 1)
        await jobs.finish("job-1", outcome("job-1"))

        with pytest.raises(Unavailable) as lost:
            await readers[0]
        assert lost.value.code == "job_lost"
        assert await readers[1] == [1, 2, 3]

    run_scenario(scenario)


def test_reading_goes_on_after_redis_was_away_and_lost_its_group(tmp_path) -> None:
    server = start_redis(tmp_path, DURABLE_CONFIG)

    async def scenario() -> None:
        nonlocal server
        jobs = RedisJobs.from_url(server.url)
        await jobs.submit(job())
        reading = asyncio.create_task(read(jobs, "job-1"))
        assert await taken(jobs, "one") == ["job-1"]
        await jobs.done("job-1")
        server.kill()
        with pytest.raises(Unavailable):
            await jobs.append([("job-1", TokenEvent(0, (1,)))])
        server = start_redis(tmp_path, DURABLE_CONFIG, port=server.port)
        await jobs._redis.xgroup_destroy(QUEUE, GROUP)
        await jobs.submit(job("job-2"))
        assert await taken(jobs, "one") == ["job-2"]
        await jobs.append([("job-1", TokenEvent(0, (1,)))])
        await jobs.finish("job-1", outcome())
        assert await reading == [1]

    try:
        asyncio.run(asyncio.wait_for(scenario(), 60))
    finally:
        server.kill()


def test_a_job_whose_taking_got_no_answer_is_returned_soon_unless_it_is_known_to_run(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(2):
            await jobs.submit(job(f"job-{n}"))
        assert await taken(jobs, "one") == ["job-0", "job-1"]
        for n in range(2):
            await make_idle(jobs, f"job-{n}", "one", 2_000)

        records = await jobs.take("one", 1, LATER_MS, known={"job-0"})

        assert [record.job.job_id for record in records] == ["job-1"]

    run_scenario(scenario)


def test_only_the_latest_cancellations_are_kept(run_scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.jobs.redis.CANCELLATIONS_KEPT", 3)

    async def scenario(jobs: RedisJobs) -> None:
        for n in range(5):
            await jobs.submit(job(f"job-{n}"))
            await jobs.cancel(f"job-{n}")
        cancelled_ids = jobs.cancellations()
        assert [(await anext(cancelled_ids))[0] for _ in range(3)] == ["job-2", "job-3", "job-4"]

    run_scenario(scenario)


def test_a_job_says_where_it_stands_until_it_ends(run_scenario) -> None:
    loading = JobPhase("loading", "2 of 3 parts are up.", 2, 3)
    recovering = JobPhase("recovering", "2 of 3 parts are up.", 2, 3)

    async def scenario(jobs: RedisJobs) -> None:
        seen: list[JobPhase | None] = []

        async def look() -> None:
            record = await jobs.get("job-1")
            assert record is not None
            assert record.phase == await jobs.phase(job())
            seen.append(record.phase)

        async def tell(phase: JobPhase | None) -> None:
            await jobs.explain({"job-1": phase, "job-2": loading})
            await look()

        await jobs.submit(job())
        await look()
        await tell(loading)
        await jobs.set_state("job-1", JobState.RUNNING)
        await tell(None)
        await tell(reading(2, 4))
        await jobs.append([("job-1", TokenEvent(0, (7, 8)))])
        await look()
        await tell(recovering)
        await tell(None)
        await jobs.finish("job-1", outcome())
        await tell(recovering)

        assert seen == [
            JobPhase("queued", "Waiting to be taken from the queue."),
            loading, reading(None, 4), reading(2, 4), answering(2, 10), recovering, answering(2, 10), None,
        ]  # fmt: skip
        assert await jobs.get("job-2") is None
        assert await jobs.phase(job("job-2")) is None

    run_scenario(scenario)


def test_a_stream_that_cannot_be_read_fails_alone(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for job_id in ("job-1", "job-2"):
            await jobs.submit(job(job_id))
        following = [asyncio.create_task(streamed(jobs, job_id)) for job_id in ("job-1", "job-2")]
        await asyncio.sleep(0.05)
        await jobs._redis.xadd(tokens_key("job-1"), {"tokens": "seven"}, id="1-0")
        await jobs.append([("job-2", TokenEvent(0, (7,)))])
        await jobs.finish("job-2", outcome("job-2"))

        assert len(await following[1]) == 2
        with pytest.raises(InternalError, match="fault-"):
            await following[0]

    run_scenario(scenario)


def test_a_record_that_cannot_be_read_stops_no_other_job_and_is_forgotten_at_the_third_time(
    run_scenario,
) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(3):
            await jobs.submit(job(f"job-{n}"))
        await jobs._redis.hset(job_key("job-1"), "job", '{"job_id": "job-1"}')
        assert await taken(jobs, "one") == ["job-0", "job-2"]
        assert [record.job.job_id for record in await jobs.of(ALICE, 9)] == ["job-2", "job-0"]
        with pytest.raises(InternalError):
            await jobs.get("job-1")
        assert [record.job.job_id for record in await jobs.take_over("two")] == ["job-0", "job-2"]
        assert [record.job.job_id for record in await jobs.take_over("three")] == ["job-0", "job-2"]

        assert await jobs.get("job-1") is None
        assert await jobs._redis.xlen(QUEUE) == 2
        assert await jobs.give_up("job-1"), "what it reserved can be given back"

    run_scenario(scenario)


def test_a_fault_of_a_job_that_redis_lost_leaves_no_record(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        assert await jobs.count_fault("job-1") == 0
        assert not await jobs._redis.exists(job_key("job-1"))
        # As a count does that comes while the record is lost.
        await jobs._redis.hset(job_key("job-1"), "faults", 1)
        await jobs._redis.hset(job_key("job-2"), "faults", 1)
        await jobs.submit(job("job-1"))
        assert await taken(jobs, "one") == ["job-1"]
        assert await jobs.give_up("job-2"), "what it reserved can be given back"
        assert not await jobs.give_up("job-1")

    run_scenario(scenario)


def test_a_phase_of_another_release_is_not_shown(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs._redis.hset(job_key("job-1"), "phase", '{"name": "warming", "text": "Warming."}')

        assert await taken(jobs, "one") == ["job-1"]
        assert (await jobs.phase(job())).name == "queued"

    run_scenario(scenario)


def test_an_end_that_cannot_be_read_is_the_fault_of_one_follower(run_scenario, monkeypatch) -> None:
    monkeypatch.setattr(token_reader, "_QUIET_S", 0.0)

    async def scenario(jobs: RedisJobs) -> None:
        for n in range(2):
            await jobs.submit(job(f"job-{n}"))
        broken, other = (asyncio.create_task(streamed(jobs, f"job-{n}")) for n in range(2))
        await asyncio.sleep(0.05)
        await jobs._redis.hset(job_key("job-0"), "outcome", "{}")
        with pytest.raises(InternalError):
            await asyncio.wait_for(broken, 30)
        await jobs.finish("job-1", outcome("job-1"))
        assert await asyncio.wait_for(other, 30) == [outcome("job-1")]

    run_scenario(scenario)


def test_a_reader_of_tokens_waits_no_longer_for_redis_the_longer_it_is_away(
    run_scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.append([("job-1", TokenEvent(0, (5,)))])
        pauses_s = away_for(6, jobs._reader._redis, "xread", monkeypatch)
        async for event in jobs.events("job-1"):
            assert event == TokenEvent(0, (5,))
            break
        assert pauses_s == [0.1] * 6

    run_scenario(scenario)
