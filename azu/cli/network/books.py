"""The plain processes beside a network's Ray cluster: Redis, chain and treasury."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from azu.cli.network.chain import (
    DEVNET,
    DEVNET_READY,
    TREASURY,
    TREASURY_READY,
    Chain,
    choose_chain,
    start_devnet,
    start_treasury,
)
from azu.cli.network.children import Children
from azu.cli.network.redis_server import RedisUrls, start_redis, wait_for_redis
from azu.cli.network.running import running_in
from azu.config import Settings


@dataclass(frozen=True, slots=True)
class Books:
    """A chain, a treasury that runs, and where each process finds Redis."""

    chain: Chain
    redis: RedisUrls
    _groups: tuple[Children, ...] = field(repr=False)

    def revive(self) -> list[str]:
        """Start again which processes died, and return their names."""
        return [name for group in self._groups for name in group.revive()]


@contextmanager
def books_kept(settings: Settings, timeout_s: float) -> Iterator[Books]:
    """Run what a network on somebody else's Ray cluster needs beside it, until the context is left.

    Raises Conflict when a network runs in the same home, Unavailable or DeadlineExceeded with the last words
    of the process that did not come up.
    """
    logs = settings.home / "logs"
    with running_in(settings.home), Children(logs) as services, Children(logs) as treasury:
        chain = choose_chain(settings)
        redis = start_books(services, settings, chain, timeout_s)
        start_treasury(treasury, settings, chain, redis.treasury)
        treasury.wait_until_said(TREASURY, TREASURY_READY, timeout_s)
        yield Books(chain, redis, (services, treasury))


def start_books(services: Children, settings: Settings, chain: Chain, timeout_s: float) -> RedisUrls:
    """Start the Redis and the devnet that are not configured; returns how each process finds Redis."""
    if chain.is_devnet:
        start_devnet(services, chain)
    if settings.redis_url is None:
        server = start_redis(services, settings.home / "redis")
        wait_for_redis(services, server, timeout_s)
        urls = server.urls
    else:
        urls = RedisUrls.same(settings.redis_url)
    if chain.is_devnet:
        services.wait_until_said(DEVNET, DEVNET_READY, timeout_s)
    return urls


def admin_key_of(settings: Settings) -> str:
    """Return the admin's key of the settings, else a new one."""
    if settings.admin_key is not None:
        return settings.admin_key.get_secret_value()
    return f"azu-admin-{secrets.token_urlsafe(32)}"
