"""The Redis client: a cancelled task always ends."""

import asyncio
from contextlib import suppress

from redis.exceptions import ResponseError

from azu.redis_client import connect_redis, retry_until_available


async def _ask_for_ever(redis_url: str) -> None:
    async with connect_redis(redis_url) as redis:
        while True:
            await retry_until_available(redis.ping)
            with suppress(ResponseError):
                await redis.xgroup_create("no-stream", "group")


def test_an_endless_task_ends_when_it_is_cancelled_at_any_moment(redis_url: str) -> None:
    async def cancelled_after(seconds: float) -> bool:
        asking = asyncio.create_task(_ask_for_ever(redis_url))
        await asyncio.sleep(seconds)
        asking.cancel()
        ended, _ = await asyncio.wait([asking], timeout=30)
        while not asking.done():
            asking.cancel()
            await asyncio.wait([asking], timeout=0.01)
        return bool(ended)

    async def scenario() -> list[bool]:
        return [await cancelled_after(step * 1e-4) for step in range(50)]

    assert all(asyncio.run(scenario()))
