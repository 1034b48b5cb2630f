"""The Redis client: a cancelled task always ends, and a Redis that takes no writes is away."""

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from redis.exceptions import ResponseError

from azu.contact import STANDING_S
from azu.errors import Unavailable
from azu.redis_client import connect_redis, redis_problem, retry_until_available
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


# Some milliseconds of work; a script's clock stands still, so that it cannot wait for a time.
SPIN = """
local sum = 0
for number = 1, 120000 do sum = sum + number % 7 end
return sum > 0 and 1
"""
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


def lacks_replicas(admin: redis.Redis, folder: Path) -> Callable[[], None]:
    admin.config_set("min-replicas-to-write", 1)
    return lambda: admin.config_set("min-replicas-to-write", 0)


@pytest.mark.parametrize("fault", [becomes_a_replica, has_no_memory_left, cannot_save, lacks_replicas])
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


def test_a_silent_redis_is_away_for_callers_that_cannot_wait_and_others_get_their_answer(
    tmp_path: Path,
) -> None:
    server = start_redis(tmp_path / "redis")

    async def scenario() -> None:
        async with connect_redis(server.url, silence_s=0.1) as hasty, connect_redis(server.url) as patient:
            assert await hasty.xread({"stream": "0"}, block=300) == [], "a read that waits is not silence"
            server.process.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(patient.set("key", "value"))
            for _ in range(2):
                with pytest.raises(Unavailable) as refused:
                    await hasty.get("key")
                assert refused.value.retry_after_s
            assert redis_problem(hasty) is not None
            server.process.send_signal(signal.SIGCONT)
            assert await waiting
            assert await hasty.get("key") == "value"
            assert redis_problem(hasty) is None

    try:
        asyncio.run(scenario())
    finally:
        server.kill()


def test_calls_that_wait_their_turn_are_answered_however_little_patience_they_have(redis_url: str) -> None:
    async def scenario() -> None:
        async with connect_redis(redis_url, silence_s=1.0) as client:
            script = client.register_script(SPIN)
            # Each takes a while, and far more of them than connections wait at once.
            answers = await asyncio.gather(*(script() for _ in range(200)))
            assert answers == [1] * 200

    asyncio.run(scenario())


def test_a_wrong_password_is_an_absence_that_is_named_only_when_it_lasts(tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis")
    admin = redis.Redis(port=server.port)
    admin.config_set("requirepass", "right")

    async def scenario() -> None:
        async with connect_redis(server.url.replace("//", "//:wrong@")) as client:
            with pytest.raises(Unavailable):
                await client.get("key")
            now_s = time.monotonic()
            assert "password" not in str(redis_problem(client, now_s))
            assert "check REDIS_USERNAME and REDIS_PASSWORD" in str(redis_problem(client, now_s + STANDING_S))

            admin.config_set("requirepass", "wrong")
            await client.get("key")
            assert redis_problem(client, now_s + STANDING_S) is None

    try:
        asyncio.run(scenario())
    finally:
        server.kill()


def test_a_caller_that_waits_for_so_long_and_no_longer_gets_the_error() -> None:
    async def scenario() -> None:
        async with connect_redis("redis://127.0.0.1:9/0", silence_s=0.1) as client:
            with pytest.raises(Unavailable):
                await retry_until_available(client.ping, within_s=0.2)

    asyncio.run(scenario())
