"""The tests' Redis is empty for each test, loads its files again, and reports why it did not start."""

from pathlib import Path

import pytest
import redis

from tests.redis_server import RedisDidNotStart, start_redis


@pytest.mark.parametrize("turn", [1, 2])
def test_redis_is_empty_at_the_start_of_every_test(redis_url: str, turn: int) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left over", turn)


def test_a_server_loads_the_files_of_a_killed_one(tmp_path: Path) -> None:
    durable = {"appendonly": "yes", "appendfsync": "always"}
    first = start_redis(tmp_path, durable)
    with redis.Redis.from_url(first.url) as client:
        client.set("kept", "yes")
    first.kill()

    second = start_redis(tmp_path, durable, port=first.port)
    with redis.Redis.from_url(second.url) as client:
        assert client.get("kept") == b"yes"
    second.stop()


def test_a_server_that_does_not_start_raises_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"not a log")
    with pytest.raises(RedisDidNotStart, match="Bad file format"):
        start_redis(tmp_path, {"appendonly": "yes"})
