"""The one way to reach Redis: timeouts on every call, typed errors. Only Redis adapters use it."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from redis import Redis as SyncRedis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as NoReply
from redis.retry import Retry as SyncRetry

from azu.errors import Unavailable

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 15.0
_MAX_CONNECTIONS = 32
_RETRIES = 3
_PAUSE_S = 0.5
# What Redis answers when it takes no command, or no write, for a while: it loads its files, it is a replica
# or lost its own, it has no memory left, its last save failed, or a script holds it. An error inside a script
# has the word in its message, and redis-py strips some of them off.
_AWAY_ERRORS = (ConnectionLost, NoReply, ReadOnlyError, OutOfMemoryError)
_AWAY = re.compile(r"\b(READONLY|OOM|MISCONF|LOADING|MASTERDOWN|NOREPLICAS|CLUSTERDOWN|TRYAGAIN|BUSY)\b")
_OPTIONS: dict[str, Any] = {
    "decode_responses": True,
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "socket_timeout": REPLY_TIMEOUT_S,
    "health_check_interval": 15,
}


def connect_redis(url: str) -> Redis:
    """Return a client of the Redis at `url` ("redis://user:password@host:port/0") that takes and gives `str`.

    A blocking read must ask for less than REPLY_TIMEOUT_S. The client opens lost connections again and
    repeats the command, which may have run already: every write must be safe to send twice. When all
    connections of the pool are in use, a call waits for one. A command or pipeline raises Unavailable when
    Redis still does not answer.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=REPLY_TIMEOUT_S,
        retry=Retry(_backoff(), _RETRIES),
        **_OPTIONS,
    )
    return _Client.from_pool(pool)


def connect_redis_sync(url: str) -> SyncRedis:
    """Return a blocking client with the same options; its callers use `typed_redis_errors`."""
    return SyncRedis.from_url(url, retry=SyncRetry(_backoff(), _RETRIES), **_OPTIONS)


async def retry_until_available(call: Callable[[], Awaitable[_Answer]]) -> _Answer:
    """Call Redis again and again until it is available; the call must be safe to make twice."""
    while True:
        try:
            return await call()
        except Unavailable as error:
            log.warning("%s", error.message)
            await asyncio.sleep(_PAUSE_S)


@contextmanager
def typed_redis_errors() -> Iterator[None]:
    """Raise Unavailable in place of every error of Redis; a caller may send the same command again."""
    try:
        yield
    except RedisError as error:
        raise Unavailable(f"Redis did not answer: {error}") from error


class _Client(Redis):
    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        with _typed_and_cancellable():
            return await super().execute_command(*arguments, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _Pipeline(Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with _typed_and_cancellable():
            return await super().execute(raise_on_error)


@contextmanager
def _typed_and_cancellable() -> Iterator[None]:
    """Raise Unavailable when Redis does not answer, and CancelledError whenever the task was cancelled.

    redis-py loses some cancellations while it opens a connection.
    """
    task = asyncio.current_task()
    assert task is not None
    cancellations = task.cancelling()
    try:
        yield
    except RedisError as error:
        if not _is_away(error):
            raise
        raise Unavailable(f"Redis did not answer: {error}") from error
    finally:
        # Also in place of an answer or another error: the caller may handle that one and go on.
        if task.cancelling() > cancellations:
            raise asyncio.CancelledError


def _is_away(error: RedisError) -> bool:
    """Say whether Redis cannot serve now but may later, and not that it refuses this command for good."""
    return isinstance(error, _AWAY_ERRORS) or _AWAY.search(str(error)) is not None


def _backoff() -> ExponentialBackoff:
    return ExponentialBackoff(cap=1.0, base=0.05)
