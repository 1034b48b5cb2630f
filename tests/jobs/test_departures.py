"""A job whose client hung up waits for it; the same request goes on with it, and no other does."""

import asyncio

from azu.jobs.departures import Departures, Reader, request_name
from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobState
from tests.builders import ALICE, BOB, job
from tests.jobs.endings import outcome

ASKED = request_name("key-1", b"content")


async def submitted(jobs: RedisJobs, departures: Departures, *job_ids: str) -> list[Reader]:
    """Submit jobs of one request; return their first readers."""
    await departures.beat()
    for job_id in job_ids:
        await jobs.submit(job(job_id), ASKED, departures.ingress)
    return [Reader(job_id, ALICE, ASKED) for job_id in job_ids]


async def is_cancelled(jobs: RedisJobs, job_id: str = "job-1") -> bool:
    return (await jobs.progress(job(job_id))).cancelled


def test_a_job_that_is_left_is_cancelled_until_the_same_request_comes_again(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=600)
        (first,) = await submitted(jobs, departures, "job-1")
        assert await departures.find(ALICE, ASKED) is None, "its first reader is there"
        for _ in range(2):
            await departures.leave(first)
        record = await jobs.get("job-1")
        assert record is not None
        assert (record.cancelled, await jobs.set_state("job-1", JobState.QUEUED)) == (True, True)
        assert 599 < await jobs.left_for("job-1") <= 600
        assert await departures.waiting(ALICE) == ["job-1"]

        assert await departures.find(ALICE, request_name("key-2", b"content")) is None
        assert await departures.find(ALICE, request_name("key-1", b"other")) is None
        back = await departures.find(ALICE, ASKED)
        assert back is not None
        assert back.job_id == "job-1"
        assert await jobs.left_for("job-1") < 0
        assert not await is_cancelled(jobs)
        assert await departures.waiting(ALICE) == []
        news = jobs.cancellations()
        assert [await anext(news) for _ in range(2)] == [("job-1", False), ("job-1", True)]

    run_scenario(scenario)


def test_a_job_waits_until_its_last_reader_has_left(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=600)
        (first,) = await submitted(jobs, departures, "job-1")
        await departures.leave(first)
        readers = await asyncio.gather(*(departures.find(ALICE, ASKED) for _ in range(20)))
        assert {reader and reader.job_id for reader in readers} == {"job-1"}
        *most, last = readers
        for reader in [*most, first, *most]:
            assert reader is not None
            await departures.leave(reader)
            assert not await is_cancelled(jobs)
        assert last is not None
        await departures.leave(last)
        assert await is_cancelled(jobs)

    run_scenario(scenario)


def test_after_a_whole_answer_the_same_request_is_another_job(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=600)
        (first,) = await submitted(jobs, departures, "job-1")
        await departures.leave(first)
        await jobs.finish("job-1", outcome())
        back = await departures.find(ALICE, ASKED)
        assert back is not None, "the answer came to its end without a reader"
        await departures.answered(back)
        assert await departures.find(ALICE, ASKED) is None

    run_scenario(scenario)


def test_of_two_jobs_of_one_request_each_goes_on_once(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=600)
        for first in await submitted(jobs, departures, "job-1", "job-2"):
            await departures.leave(first)
        found = [await departures.find(ALICE, ASKED) for _ in range(2)]
        assert {reader and reader.job_id for reader in found} == {"job-1", "job-2"}

    run_scenario(scenario)


def test_a_job_that_ended_badly_or_for_good_does_not_go_on(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=600)
        failed, refused = await submitted(jobs, departures, "failed", "refused")
        for first in (failed, refused):
            await departures.leave(first)
        await jobs.finish("failed", outcome("failed", state=JobState.FAILED))
        await jobs.cancel("refused")
        assert await departures.find(ALICE, ASKED) is None
        assert not await jobs.client_left("refused")

    run_scenario(scenario)


def test_a_client_that_comes_too_late_finds_its_job_ended(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=0.05)
        (first,) = await submitted(jobs, departures, "job-1")
        await departures.leave(first)
        assert not await jobs.client_left("job-1")
        await asyncio.sleep(0.1)
        assert await departures.find(ALICE, ASKED) is None
        assert await jobs.left_for("job-1") == 0
        assert await jobs.client_left("job-1")

    run_scenario(scenario)


def test_without_a_time_to_come_back_and_after_many_returns_a_job_ends_at_once(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        hurried, patient = Departures(jobs._redis, kept_s=0), Departures(jobs._redis, kept_s=600)
        (first,) = await submitted(jobs, hurried, "job-1")
        await hurried.leave(first)
        assert (await jobs.left_for("job-1"), await jobs.client_left("job-1")) == (0, True)
        assert await hurried.find(ALICE, ASKED) is None

        (first,) = await submitted(jobs, patient, "job-2")
        await patient.leave(first)
        num_returns = 0
        while (back := await patient.find(ALICE, ASKED)) is not None:
            num_returns += 1
            await patient.leave(back)
        assert (num_returns, await jobs.left_for("job-2"), await jobs.client_left("job-2")) == (8, 0, True)

    run_scenario(scenario)


def test_the_readers_of_an_ingress_that_died_have_left(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        dead, other = Departures(jobs._redis, kept_s=600), Departures(jobs._redis, kept_s=600)
        await submitted(jobs, dead, "job-1")
        assert await other.find(ALICE, ASKED) is None
        await jobs._redis.pexpire(f"azu:jobs:ingress:{dead.ingress}", 500_000)
        back = await other.find(ALICE, ASKED)
        assert back is not None
        assert not await is_cancelled(jobs)
        await other.leave(back)
        assert await is_cancelled(jobs), "its first reader is gone too"

    run_scenario(scenario)


def test_a_reader_that_knows_its_job_keeps_it_running_and_a_job_without_a_connection_needs_none(
    run_scenario,
) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=600)
        (first,) = await submitted(jobs, departures, "job-1")
        second = Reader("job-1", ALICE, ASKED, "second")
        await departures.come_back(second)
        await departures.leave(first)
        assert not await is_cancelled(jobs)
        await departures.leave(second)
        assert await is_cancelled(jobs)
        await departures.come_back(second)
        assert not await is_cancelled(jobs)

        await jobs.submit(job("job-2", address=BOB))
        await departures.leave(Reader("job-2", BOB, "", "third"))
        assert not await is_cancelled(jobs, "job-2")

    run_scenario(scenario)
