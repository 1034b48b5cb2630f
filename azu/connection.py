"""One way to reach Redis, with timeouts on everything; only Redis adapters call it."""

from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry as SyncRetry

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 15.0


def connect_redis(url: str) -> Redis:
    """Return a client of the Redis at `url` ("redis://:password@host:port/0") that speaks `str`.

    A blocking read must ask for less than REPLY_TIMEOUT_S. Lost connections are opened again; what
    was sent may have run, so every write must bear being sent twice.
    """
    return Redis.from_url(
        url,
        decode_responses=True,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=REPLY_TIMEOUT_S,
        health_check_interval=15,
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), retries=3),
    )


def connect_redis_sync(url: str) -> SyncRedis:
    """Return the same for code that runs in threads of its own."""
    return SyncRedis.from_url(
        url,
        decode_responses=True,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=REPLY_TIMEOUT_S,
        health_check_interval=15,
        retry=SyncRetry(ExponentialBackoff(cap=1.0, base=0.05), retries=3),
    )
