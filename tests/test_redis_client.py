"""The Redis client: a cancelled task always ends, and a Redis that takes no writes is away."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from redis.exceptions import ResponseError

from azu.errors import Unavailable
from azu.redis_client import connect_redis, retry_until_available
from tests.redis_server import start_redis


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


SCRIPT = "redis.call('SET', KEYS[1], 'written') return 1"


def becomes_a_replica(admin: redis.Redis, folder: Path) -> Callable[[], None]:
    admin.replicaof("127.0.0.1", 1)
    return lambda: admin.replicaof("NO", "ONE")


def has_no_memory_left(admin: redis.Redis, folder: Path) -> Callable[[], None]:
    admin.config_set("maxmemory", 1)
    return lambda: admin.config_set("maxmemory", 0)


def cannot_save(admin: redis.Redis, folder: Path) -> Callable[[], None]:
    (folder / "dump.rdb" / "in-the-way").mkdir(parents=True)
    admin.config_set("save", "3600 1")
    admin.bgsave()
    while admin.info("persistence")["rdb_last_bgsave_status"] == "ok":
        time.sleep(0.01)
    return lambda: admin.config_set("save", "")


@pytest.mark.parametrize("fault", [becomes_a_replica, has_no_memory_left, cannot_save])
def test_a_redis_that_takes_no_writes_is_away_and_a_waiting_write_comes_through_later(
    tmp_path: Path, fault: Callable[[redis.Redis, Path], Callable[[], None]]
) -> None:
    server = start_redis(tmp_path / "redis")
    admin = redis.Redis(port=server.port)

    async def scenario() -> None:
        async with connect_redis(server.url) as client:
            end = fault(admin, server.folder)
            script = client.register_script(SCRIPT)
            with pytest.raises(Unavailable):
                await client.set("key", "value")
            with pytest.raises(Unavailable):
                await script(["key"])
            with pytest.raises(Unavailable):
                async with client.pipeline() as pipeline:
                    await pipeline.set("key", "value").set("other", "value").execute()

            waiting = asyncio.create_task(retry_until_available(lambda: script(["key"])))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            end()
            assert await waiting == 1
            assert await client.get("key") == "written"

    try:
        asyncio.run(scenario())
    finally:
        server.stop()


def test_a_command_that_redis_refuses_for_good_is_no_absence(redis_url: str) -> None:
    async def scenario() -> None:
        async with connect_redis(redis_url) as client:
            await client.set("key", "value")
            with pytest.raises(ResponseError):
                await client.lpush("key", "value")

    asyncio.run(scenario())
