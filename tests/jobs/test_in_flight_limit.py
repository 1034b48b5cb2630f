"""A key has at most so many jobs in flight, and those that ended make room."""

import asyncio

import pytest

from azu.errors import RateLimited
from azu.jobs.in_flight_limit import FlightLimits, RedisFlights
from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobState
from tests import builders
from tests.builders import api_key
from tests.jobs.endings import outcome

LIMIT = 3
LATER_MS = 700_000


class Desk:
    def __init__(self, redis_url: str) -> None:
        self.jobs = RedisJobs.from_url(redis_url)
        self.limits = FlightLimits(RedisFlights.from_url(redis_url), self.jobs, LIMIT)

    async def start(self, job_id: str, now_ms: int = 0) -> None:
        await self.limits.take(api_key(), job_id, now_ms)
        await self.jobs.submit(builders.job(job_id=job_id))


def test_one_more_than_the_limit_is_refused_until_one_has_ended(redis_url: str) -> None:
    async def scenario() -> None:
        desk = Desk(redis_url)
        for number in range(LIMIT):
            await desk.start(f"job-{number}")
        await desk.jobs.set_state("job-1", JobState.RUNNING)

        with pytest.raises(RateLimited) as refused:
            await desk.start("job-more")
        assert refused.value.code == "too_many_jobs"
        assert refused.value.retry_after_s

        await desk.jobs.finish("job-1", outcome("job-1"))
        await desk.start("job-more")
        with pytest.raises(RateLimited):
            await desk.start("job-again")

    asyncio.run(scenario())


def test_many_at_once_stay_within_the_limit(redis_url: str) -> None:
    async def scenario() -> None:
        desk = Desk(redis_url)
        started = (desk.start(f"job-{number}") for number in range(40))
        answers = await asyncio.gather(*started, return_exceptions=True)
        assert answers.count(None) == LIMIT

    asyncio.run(scenario())


def test_what_was_refused_or_never_written_down_makes_room(redis_url: str) -> None:
    async def scenario() -> None:
        desk = Desk(redis_url)
        for number in range(LIMIT):
            await desk.limits.take(api_key(), f"lost-{number}", 0)
        await desk.limits.give_back(api_key(), "lost-0")
        await desk.start("job-0", now_ms=1)
        with pytest.raises(RateLimited):
            await desk.start("job-1", now_ms=1)

        await desk.start("job-1", now_ms=LATER_MS)
        await desk.start("job-2", now_ms=LATER_MS)

    asyncio.run(scenario())
