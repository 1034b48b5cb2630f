"""Which addresses have claimed their earnings: nobody else is paid."""

from collections.abc import Awaitable
from typing import cast

from redis.asyncio import Redis

from azu.auth.payees import is_claim
from azu.connection import connect_redis
from azu.treasury.errors import typed_redis_errors

_CLAIMED = "azu:treasury:payees"


class RedisPayees:
    """A hash of address -> signature. The ingress writes it; whoever reads it checks the signature again.

    Every method raises Unavailable when Redis does not answer.
    """

    def __init__(self, redis: Redis, platform: str) -> None:
        self._redis = redis
        self._platform = platform

    @classmethod
    def from_url(cls, url: str, platform: str) -> "RedisPayees":
        """Return the claims on a platform in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url), platform)

    async def claim(self, address: str, signature: str) -> bool:
        """Write an address's claim down; False if the address did not sign it."""
        if not is_claim(address, self._platform, signature):
            return False
        with typed_redis_errors():
            await self._redis.hset(_CLAIMED, address, signature)
        return True

    async def has_claimed(self, address: str) -> bool:
        """Say whether an address may be paid what it earned."""
        with typed_redis_errors():
            signature = await cast(Awaitable[str | None], self._redis.hget(_CLAIMED, address))
        return signature is not None and is_claim(address, self._platform, signature)
