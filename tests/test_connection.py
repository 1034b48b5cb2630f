"""The way to Redis: what is cancelled ends."""

import asyncio

from azu.connection import connect_redis, until_back


async def _ask_for_ever(redis_url: str) -> None:
    async with connect_redis(redis_url) as redis:
        while True:
            await until_back(redis.ping)


def test_whoever_asks_for_ever_ends_when_cancelled_at_any_moment(redis_url: str) -> None:
    async def cancelled_after(seconds: float) -> bool:
        asking = asyncio.create_task(_ask_for_ever(redis_url))
        await asyncio.sleep(seconds)
        asking.cancel()
        await asyncio.wait([asking], timeout=5)
        ended = asking.done()
        asking.cancel()
        return ended

    async def scenario() -> list[bool]:
        return [await cancelled_after(step * 1e-4) for step in range(100)]

    assert all(asyncio.run(scenario()))
