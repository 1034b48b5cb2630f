"""Which process runs a network out of a home folder: at most one, and `azu down` finds it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from azu.cli.private_file import write_private
from azu.documents import read_json
from azu.errors import ConfigurationError, Conflict, DeadlineExceeded, NotFound

_LOCK = "network.lock"
_FILE = "network.json"
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _Running:
    """The process that runs a network; it was created then."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    pid: Annotated[int, Field(gt=0, lt=2**31)]
    created_s: float


_RUNNING = TypeAdapter(_Running)


@contextmanager
def running_in(home: Path) -> Iterator[None]:
    """Hold a home folder for the network of this process; raises Conflict when another one has it."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(home / _LOCK, timeout=0):
            this = psutil.Process()
            write_private(home / _FILE, _RUNNING.dump_json(_Running(this.pid, this.create_time())).decode())
            try:
                yield
            finally:
                (home / _FILE).unlink(missing_ok=True)
    except Timeout as error:
        raise Conflict(f"a network already runs in {home}; `azu down` stops it") from error


def stop_running(home: Path, timeout_s: float) -> None:
    """Have the network of a home folder stop, and wait until it has.

    Raises NotFound when none runs, DeadlineExceeded when it does not stop.
    """
    process = _find(home)
    if process is None:
        raise NotFound(f"no network runs in {home}")
    process.terminate()
    deadline = time.monotonic() + timeout_s
    while not _ended(process):
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"process {process.pid} has not stopped in {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def _ended(process: psutil.Process) -> bool:
    """Say whether a process is over, even if whoever started it has not looked yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _find(home: Path) -> psutil.Process | None:
    path = home / _FILE
    try:
        known = _RUNNING.validate_python(read_json(path)) if path.exists() else None
        process = psutil.Process(known.pid) if known else None
    except psutil.NoSuchProcess:
        return None
    except ValidationError as error:
        raise ConfigurationError(f"{path} is damaged; remove it once no network runs there") from error
    # A process id is used again; a process that was not created then is somebody else's.
    return process if known and process and process.create_time() == known.created_s else None
