"""The one way to reach Redis: timeouts on every call, typed errors, and how long Redis has been away."""

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar, cast

from redis import Redis as SyncRedis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import TimeoutError as NoReply
from redis.retry import Retry as SyncRetry

from azu.contact import RETRY_AFTER_S, Contact
from azu.errors import Unavailable

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

CONNECT_TIMEOUT_S = 2.0
REPLY_TIMEOUT_S = 5.0
_MAX_CONNECTIONS = 32
_RETRIES = 3
FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0
# What Redis answers when it takes no command, or no write, for a while: it loads its files, it is a replica
# or lost its own, it has no memory left, its last save failed, a script holds it, or it came back with other
# passwords or without a group of readers. An error inside a script has the word in its message, and redis-py
# strips some of them off.
_AWAY_ERRORS = (ConnectionLost, NoReply, ReadOnlyError, OutOfMemoryError)
_AWAY = re.compile(
    r"\b(READONLY|OOM|MISCONF|LOADING|MASTERDOWN|NOREPLICAS|CLUSTERDOWN|TRYAGAIN|BUSY|UNBLOCKED|NOAUTH"
    r"|WRONGPASS|DENIED|NOGROUP)\b"
)
_OPTIONS: dict[str, Any] = {
    "decode_responses": True,
    # Who may write there may write anything: a reader refuses the text, and does not fail to read.
    "encoding_errors": "replace",
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "socket_timeout": REPLY_TIMEOUT_S,
    "health_check_interval": 15,
}


_contacts: dict[str, Contact] = {}  # by URL


def connect_redis(url: str, *, silence_s: float = math.inf) -> Redis:
    """Return a client of the Redis at `url` ("redis://user:password@host:port/0") that takes and gives `str`.

    A blocking read must ask for less than REPLY_TIMEOUT_S. The client opens lost connections again and
    repeats the command, which may have run already: every write must be safe to send twice. When all
    connections of the pool are in use, a call waits for one. A command or pipeline raises Unavailable when
    Redis still does not answer, or when Redis answered no call of this process for `silence_s`.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=3 * REPLY_TIMEOUT_S,
        retry=Retry(_backoff(), _RETRIES),
        **_OPTIONS,
    )
    client = cast(_Client, _Client.from_pool(pool))
    client.calls = _Calls(_contacts.setdefault(url, Contact("Redis")), silence_s)
    return client


def connect_redis_sync(url: str) -> SyncRedis:
    """Return a blocking client with the same options; its callers use `typed_redis_errors`."""
    return SyncRedis.from_url(url, retry=SyncRetry(_backoff(), _RETRIES), **_OPTIONS)


def redis_problem(redis: Redis, now_s: float | None = None) -> str | None:
    """Say since when a client's Redis is away from this process, and after STANDING_S also why; else None."""
    assert isinstance(redis, _Client)
    return redis.calls.contact.problem(now_s)


async def retry_until_available(
    call: Callable[[], Awaitable[_Answer]],
    *,
    within_s: float = math.inf,
    longest_pause_s: float = _LONGEST_PAUSE_S,
) -> _Answer:
    """Call Redis again and again until it is available; the call must be safe to make twice.

    The pauses double from FIRST_PAUSE_S on. Raises Unavailable when Redis is still away after `within_s`.
    """
    began_s, pause_s = time.monotonic(), 0.0
    while True:
        try:
            return await call()
        except Unavailable as error:
            if time.monotonic() - began_s >= within_s:
                raise
            if not pause_s:
                log.warning("%s", error.message)
        pause_s = min(2 * pause_s or FIRST_PAUSE_S, longest_pause_s)
        await asyncio.sleep(pause_s)


@contextmanager
def typed_redis_errors() -> Iterator[None]:
    """Raise Unavailable in place of every error of Redis; a caller may send the same command again."""
    try:
        yield
    except RedisError as error:
        raise Unavailable(f"Redis did not answer: {error}", retry_after_s=RETRY_AFTER_S) from error


class _Calls:
    """What every call of one client passes: the limit on silence, and typed errors."""

    def __init__(self, contact: Contact, silence_s: float) -> None:
        self.contact = contact
        self._silence_s = silence_s

    @asynccontextmanager
    async def guarded(self, blocks_s: float = 0.0) -> AsyncIterator[None]:
        """Raise Unavailable when Redis does not answer, and CancelledError whenever the task was cancelled.

        redis-py loses some cancellations while it opens a connection.
        """
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        try:
            async with self.contact.unless_silent(self._silence_s + blocks_s):
                yield
            self.contact.answers()
        except (RedisError, TimeoutError) as error:
            if isinstance(error, RedisError) and not _is_away(error):
                self.contact.answers()
                raise
            unavailable = self.contact.fails(error)
            if isinstance(error, AuthenticationError):
                self.contact.reason += "; check REDIS_USERNAME and REDIS_PASSWORD"
            raise unavailable from error
        finally:
            # Also in place of an answer or another error: the caller may handle that one and go on.
            if task.cancelling() > cancellations:
                raise asyncio.CancelledError


class _Client(Redis):
    calls: _Calls

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        async with self.calls.guarded(_blocks_s(arguments)):
            return await super().execute_command(*arguments, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        pipeline = _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline.calls = self.calls
        return pipeline


class _Pipeline(Pipeline):
    calls: _Calls

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        async with self.calls.guarded():
            return await super().execute(raise_on_error)


def _blocks_s(arguments: tuple[Any, ...]) -> float:
    """Return how long a read of a stream or a list asks Redis to wait."""
    if arguments[0] == "BLPOP":
        return float(arguments[-1])
    if b"BLOCK" not in arguments:
        return 0.0
    return int(arguments[arguments.index(b"BLOCK") + 1]) / 1000


def _is_away(error: RedisError) -> bool:
    """Say whether Redis cannot serve now but may later, and not that it refuses this command for good."""
    return isinstance(error, _AWAY_ERRORS) or _AWAY.search(str(error)) is not None


def _backoff() -> ExponentialBackoff:
    return ExponentialBackoff(cap=1.0, base=0.05)
