"""The Redis that holds the money: whether it answers, keeps what it acknowledged, and over which link."""

from collections.abc import Iterator
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from azu.cli.doctor.findings import Finding, State
from azu.config import Settings
from azu.errors import NotFound
from azu.ledger.durable import APPEND_ONLY_FILE, DURABLE_CONFIG

if TYPE_CHECKING:
    from redis import Redis

_OLDEST = (6, 2)


def redis(settings: Settings) -> Iterator[Finding]:
    """Look at the Redis of REDIS_HOST, or that of the network that runs here."""
    from redis import Redis
    from redis.exceptions import RedisError

    from azu.cli.network.redis_server import own_redis_url

    try:
        url = settings.redis_url or own_redis_url(settings.home)
    except NotFound:
        yield Finding("Redis", State.OK, "none yet: `azu up` starts its own")
        return
    yield _link(url)
    with Redis.from_url(url, socket_timeout=3.0, socket_connect_timeout=3.0, decode_responses=True) as client:
        try:
            server = client.info("server")
            persistence = client.info("persistence")
        except RedisError as error:
            is_own = settings.redis_url is None and not (settings.home / "admin.json").exists()
            yield Finding(
                "Redis",
                State.OK if is_own else State.BAD,
                "azu's own, not running" if is_own else str(error),
                "" if is_own else "start it, and check REDIS_HOST, REDIS_PORT and REDIS_PASSWORD",
            )
            yield from _file(settings)
            return
        yield _version(server["redis_version"])
        yield _append_only_file(persistence)
        yield from _configuration(client)


def _link(url: str) -> Finding:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "rediss":
        return Finding("Redis link", State.OK, f"encrypted, to {host}")
    if _is_this_machine(host):
        return Finding("Redis link", State.OK, "not encrypted, but within this machine")
    return Finding(
        "Redis link",
        State.BAD,
        f"not encrypted, to {host}: money and keys cross the network in the clear",
        "AZU_REDIS_TLS=1 (and AZU_REDIS_CA for an authority of your own)",
    )


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _version(found: str) -> Finding:
    good = tuple(map(int, found.split(".")[:2])) >= _OLDEST
    return Finding("Redis", State.OK if good else State.BAD, found, "" if good else "use 6.2 or later")


def _append_only_file(persistence: dict[str, object]) -> Finding:
    if not persistence["aof_enabled"]:
        return Finding("append-only file", State.BAD, "off", "CONFIG SET appendonly yes")
    failed = [
        name
        for name in ("aof_last_write_status", "aof_last_bgrewrite_status")
        if persistence.get(name, "ok") != "ok"
    ]
    advice = "look at the disk of Redis: it could not write" if failed else ""
    told = ", ".join(failed) + " failed" if failed else "on, its last write went well"
    return Finding("append-only file", State.BAD if failed else State.OK, told, advice)


def _configuration(client: "Redis") -> Iterator[Finding]:
    from redis.exceptions import RedisError

    try:
        # One name at a time: Redis 6 takes no more.
        found = {name: client.config_get(name).get(name) for name in DURABLE_CONFIG}
    except RedisError as error:
        yield Finding("durability", State.UNKNOWN, f"this user may not look: {error}", "ask Redis's owner")
        return
    # The file's name is its owner's business; the others are what the ledger counts on.
    others = {
        name: value
        for name, value in DURABLE_CONFIG.items()
        if name != "appendfilename" and found[name] not in (value, None)
    }
    advice = "; ".join(f'CONFIG SET {name} "{value}"' for name, value in others.items())
    told = ", ".join(f"{name} is {found[name]!r}" for name in others) or "what is acknowledged is on disk"
    yield Finding("durability", State.BAD if others else State.OK, told, advice)


def _file(settings: Settings) -> Iterator[Finding]:
    """Look at whether the books of a network that stands still end with a whole transfer."""
    from mmap import ACCESS_READ, mmap

    from azu.errors import LedgerError
    from azu.ledger.append_only_file import read

    path = settings.home / "redis" / APPEND_ONLY_FILE
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        try:
            whole = read(content).whole_bytes == len(content)
        except LedgerError as error:
            yield Finding("append-only file", State.BAD, error.message, "restore it from a copy")
            return
    told = "whole to its last byte" if whole else "its tail is torn, as by a crash of the machine"
    yield Finding(
        "append-only file", State.OK if whole else State.BAD, told, "" if whole else "azu ledger repair"
    )
