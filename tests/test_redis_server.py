"""The tests' Redis starts empty for each test, keeps its files, and says why it did not start."""

from pathlib import Path

import pytest
import redis

from tests.redis_server import RedisDidNotStart, start_redis


@pytest.mark.parametrize("turn", [1, 2])
def test_every_test_finds_an_empty_redis(redis_url: str, turn: int) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left over", turn)


def test_a_killed_server_finds_its_files_again(tmp_path: Path) -> None:
    durable = {"appendonly": "yes", "appendfsync": "always"}
    first = start_redis(tmp_path, durable)
    with redis.Redis.from_url(first.url) as client:
        client.set("kept", "yes")
    first.kill()

    second = start_redis(tmp_path, durable, port=first.port)
    with redis.Redis.from_url(second.url) as client:
        assert client.get("kept") == b"yes"
    second.stop()


def test_a_server_that_refuses_its_configuration_says_so(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"not a log")
    with pytest.raises(RedisDidNotStart, match="Bad file format"):
        start_redis(tmp_path, {"appendonly": "yes"})
