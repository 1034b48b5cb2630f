"""Jobs over the session's Redis."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from azu.jobs.redis import RedisJobs
from azu.redis_client import connect_redis

Scenario = Callable[[RedisJobs], Awaitable[None]]


@pytest.fixture
def run_scenario(redis_url: str) -> Callable[[Scenario], None]:
    """Run a scenario with jobs in an empty Redis, for at most 20 seconds."""

    async def run(scenario: Scenario) -> None:
        redis = connect_redis(redis_url)
        try:
            await asyncio.wait_for(scenario(RedisJobs(redis)), 20)
        finally:
            await redis.aclose()

    return lambda scenario: asyncio.run(run(scenario))
