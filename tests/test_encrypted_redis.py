"""The encrypted connection to Redis: the settings turn it on, and a wrong certificate is refused."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from azu.auth.challenges import RedisChallenges
from azu.config import Settings
from azu.errors import Unavailable
from azu.launch.membership import TlsFiles, head_files
from azu.redis_client import connect_redis
from tests.builders import ALICE
from tests.redis_server import RunningRedis

PLATFORM = "0x" + "99" * 20


@contextmanager
def encrypted(redis: RunningRedis, files: TlsFiles) -> Iterator[int]:
    """Run a TLS proxy in front of a Redis; yields its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.certificate, files.key)
    loop, ready = asyncio.new_event_loop(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    async def relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while chunk := await source.read(65536):
            sink.write(chunk)
            await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", redis.port)
        await asyncio.gather(relay(reader, inner_writer), relay(inner_reader, writer), return_exceptions=True)

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(asyncio.start_server(serve, sock=listener, ssl=context))
        ready.set()
        loop.run_forever()
        for task in (left := asyncio.all_tasks(loop)):
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield listener.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        listener.close()


def settings(port: int, authority: Path | None) -> Settings:
    return Settings(redis_host="127.0.0.1", redis_port=port, redis_tls=True, redis_ca=authority)


async def write_something(url: str) -> str:
    redis = connect_redis(url)
    try:
        made = await asyncio.wait_for(
            RedisChallenges(redis, PLATFORM).challenge(ALICE, "ab" * 32, "azu.test", 1), 60
        )
        return made.nonce
    finally:
        await redis.aclose()


def test_a_write_over_an_encrypted_connection_arrives(
    redis_server: RunningRedis, redis_url: str, tmp_path: Path
) -> None:
    files = head_files(tmp_path, ["127.0.0.1"]).ray
    with encrypted(redis_server, files) as port:
        url = settings(port, files.authority).redis_url
        assert url is not None
        asyncio.run(write_something(url))

    async def check() -> None:
        redis = connect_redis(redis_url)
        assert len(await redis.keys("azu:auth:challenge:*")) == 1
        await redis.aclose()

    asyncio.run(check())


def test_a_redis_with_another_certificate_gets_no_command(
    redis_server: RunningRedis, redis_url: str, tmp_path: Path
) -> None:
    expected = head_files(tmp_path / "ours", ["127.0.0.1"]).ray
    with encrypted(redis_server, head_files(tmp_path / "other", ["127.0.0.1"]).ray) as port:
        for authority in (expected.authority, None):
            url = settings(port, authority).redis_url
            assert url is not None
            with pytest.raises(Unavailable, match="certificate"):
                asyncio.run(write_something(url))
