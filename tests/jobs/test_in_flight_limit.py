"""An account has at most `limit` jobs in flight; ended and lost jobs make room."""

import asyncio
from dataclasses import replace

import pytest

from azu.errors import RateLimited
from azu.jobs.in_flight_limit import InFlightLimit
from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobState
from azu.redis_client import connect_redis
from tests import builders
from tests.builders import api_key
from tests.jobs.endings import outcome

LIMIT = 3
LATER_MS = 700_000


class Submissions:
    def __init__(self, redis_url: str) -> None:
        self.jobs = RedisJobs.from_url(redis_url)
        self.limit = InFlightLimit(connect_redis(redis_url), self.jobs, LIMIT)

    async def submit(self, job_id: str, now_ms: int = 0) -> None:
        await self.limit.add(api_key(), job_id, now_ms)
        await self.jobs.submit(builders.job(job_id=job_id))


def test_a_job_beyond_the_limit_is_refused_until_another_has_ended(redis_url: str) -> None:
    async def scenario() -> None:
        submissions = Submissions(redis_url)
        for number in range(LIMIT):
            await submissions.submit(f"job-{number}")
        await submissions.jobs.set_state("job-1", JobState.RUNNING)

        with pytest.raises(RateLimited) as refused:
            await submissions.submit("job-more")
        assert refused.value.code == "too_many_jobs"
        assert refused.value.retry_after_s

        await submissions.jobs.finish("job-1", outcome("job-1"))
        await submissions.submit("job-more")
        with pytest.raises(RateLimited):
            await submissions.submit("job-again")

    asyncio.run(scenario())


def test_concurrent_jobs_stay_within_the_limit(redis_url: str) -> None:
    async def scenario() -> None:
        submissions = Submissions(redis_url)
        started = (submissions.submit(f"job-{number}") for number in range(40))
        answers = await asyncio.gather(*started, return_exceptions=True)
        assert answers.count(None) == LIMIT

    asyncio.run(scenario())


def test_a_refused_job_and_a_lost_job_make_room(redis_url: str) -> None:
    async def scenario() -> None:
        submissions = Submissions(redis_url)
        for number in range(LIMIT):
            await submissions.limit.add(api_key(), f"lost-{number}", 0)
        await submissions.limit.remove(api_key(), "lost-0")
        await submissions.submit("job-0", now_ms=1)
        with pytest.raises(RateLimited):
            await submissions.submit("job-1", now_ms=1)

        await submissions.submit("job-1", now_ms=LATER_MS)
        await submissions.submit("job-2", now_ms=LATER_MS)

    asyncio.run(scenario())


def test_the_keys_of_an_account_share_its_limit_and_an_account_that_pays_has_more(redis_url: str) -> None:
    async def scenario() -> None:
        async def times(_: str) -> float:
            return more[0]

        more = [1.0]
        limit = InFlightLimit(connect_redis(redis_url), RedisJobs.from_url(redis_url), LIMIT, times)
        keys = [replace(api_key(), key_id=f"key-{number}") for number in range(2 * LIMIT + 1)]
        for key in keys[:LIMIT]:
            await limit.add(key, f"job-{key.key_id}", 0)
        with pytest.raises(RateLimited, match="3 jobs of this account"):
            await limit.add(keys[LIMIT], "job-more", 0)
        more[0] = 2.0
        for key in keys[LIMIT : 2 * LIMIT]:
            await limit.add(key, f"job-{key.key_id}", 0)
        with pytest.raises(RateLimited, match="6 jobs"):
            await limit.add(keys[-1], "job-last", 0)

    asyncio.run(scenario())
