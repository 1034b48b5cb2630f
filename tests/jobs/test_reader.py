"""Hundreds of streams are followed over one connection, each token reaching each follower once."""

import asyncio
import time

import pytest

from azu.errors import Unavailable
from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobOutcome, TokenEvent
from tests.builders import job
from tests.jobs.endings import outcome
from tests.redis_server import start_redis

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


def test_hundreds_of_streams_share_one_blocked_read(play) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        ids = [f"job-{n}" for n in range(STREAMS)]
        of_others = await connections(jobs)
        for job_id in ids:
            await jobs.submit(job(job_id))
        reading = []
        for job_id in ids:
            reading.append(asyncio.create_task(read(jobs, job_id)))
            await until_read(jobs, len(reading))
        assert await connections(jobs) - of_others <= 3
        for index in range(TOKENS):
            await jobs.append([(job_id, TokenEvent(index, (index,))) for job_id in ids])
        for job_id in ids:
            await jobs.finish(job_id, outcome(job_id))

        assert await asyncio.gather(*reading) == [list(range(TOKENS))] * STREAMS
        assert not jobs._reader._followers

    play(scenario)


def test_a_new_follower_hears_its_first_token_at_once_while_others_are_quiet(play) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(2):
            await jobs.submit(job(f"job-{n}"))
        quiet = jobs.events("job-0")
        waiting = asyncio.ensure_future(anext(quiet))
        await asyncio.sleep(0.1)  # the reader is blocked on the quiet stream now
        first = asyncio.ensure_future(anext(jobs.events("job-1")))
        await asyncio.sleep(0.1)
        written = time.perf_counter()
        await jobs.append([("job-1", TokenEvent(0, (7,)))])

        assert await first == TokenEvent(0, (7,))
        assert time.perf_counter() - written < 0.5
        waiting.cancel()

    play(scenario)


def test_followers_of_one_job_at_different_places_each_get_what_they_lack(play) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        await jobs.append([("job-1", TokenEvent(0, (0, 1, 2, 3)))])
        reading = [asyncio.create_task(read(jobs, "job-1", after)) for after in (0, 2, 4, 1)]
        await until_read(jobs, 4)
        await jobs.append([("job-1", TokenEvent(4, (4, 5)))])
        await jobs.finish("job-1", outcome())

        assert await asyncio.gather(*reading) == [list(range(after, 6)) for after in (0, 2, 4, 1)]

    play(scenario)


def test_a_follower_that_leaves_is_forgotten_and_the_others_go_on(play) -> None:
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

    play(scenario)


def test_reading_goes_on_when_the_connection_is_cut(play) -> None:
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

    play(scenario)


def test_followers_hear_when_redis_is_gone_instead_of_waiting_for_ever(tmp_path) -> None:
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
