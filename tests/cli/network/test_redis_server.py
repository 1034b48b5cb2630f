"""Our own Redis keeps what it acknowledged, and lets nobody in without its password."""

import os
import signal
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from azu.cli.network.children import Children
from azu.cli.network.redis_server import NAME, RedisServer, start_redis, wait_for_redis
from azu.errors import Unavailable

TIMEOUT_S = 15.0


def started(children: Children, folder: Path) -> RedisServer:
    server = start_redis(children, folder)
    wait_for_redis(children, server, TIMEOUT_S)
    return server


def test_it_is_durable_and_evicts_nothing(tmp_path: Path) -> None:
    with Children(tmp_path / "logs") as children:
        server = started(children, tmp_path / "redis")
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            config = client.config_get("*")

    assert config["appendonly"] == "yes"
    assert config["appendfsync"] == "always"
    assert config["aof-load-truncated"] == "no"
    assert config["maxmemory-policy"] == "noeviction"
    assert config["bind"] == "127.0.0.1"


def test_without_the_password_it_answers_nobody(tmp_path: Path) -> None:
    with Children(tmp_path / "logs") as children:
        server = started(children, tmp_path / "redis")
        without = redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0))
        with without as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        arguments = Path(f"/proc/{children.pid(NAME)}/cmdline").read_text()

    assert server.password not in arguments
    assert (tmp_path / "redis" / "redis.conf").stat().st_mode & 0o777 == 0o600
    assert server.password not in repr(server)


def test_what_was_written_is_there_after_a_kill_and_a_restart(tmp_path: Path) -> None:
    with Children(tmp_path / "logs") as children:
        server = started(children, tmp_path / "redis")
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            client.set("kept", "yes")
            os.kill(children.pid(NAME), signal.SIGKILL)
            while not children.revive():
                pass
            wait_for_redis(children, server, TIMEOUT_S)
            assert client.get("kept") == "yes"

    with Children(tmp_path / "logs") as children:
        server = started(children, tmp_path / "redis")
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            assert client.get("kept") == "yes"


def test_a_damaged_file_is_refused_not_cut_short(tmp_path: Path) -> None:
    with Children(tmp_path / "logs") as children:
        server = started(children, tmp_path / "redis")
        with redis.Redis.from_url(server.url) as client:
            client.set("key", "value")
    file = tmp_path / "redis" / "appendonly.aof"
    file.write_bytes(file.read_bytes()[:-3])

    with Children(tmp_path / "logs") as children:
        server = start_redis(children, tmp_path / "redis")
        with pytest.raises(Unavailable, match=r"end of file|truncated|Bad file format"):
            wait_for_redis(children, server, TIMEOUT_S)


def test_a_folder_with_a_space_in_its_name_will_do(tmp_path: Path) -> None:
    with Children(tmp_path / "logs") as children:
        started(children, tmp_path / "my redis")

    assert (tmp_path / "my redis" / "appendonly.aof").exists()
