"""What the treasury's Redis can do to its callers, in azu's own errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from azu.errors import Unavailable


@contextmanager
def typed_redis_errors() -> Iterator[None]:
    """Turn every error of Redis into Unavailable: what was sent may have run, and may be sent again."""
    try:
        yield
    except RedisError as error:
        raise Unavailable(f"the treasury's Redis did not answer: {error}") from error
