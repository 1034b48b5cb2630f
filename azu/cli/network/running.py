"""Which process runs a network out of a home folder: at most one, and `azu down` finds it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from azu.cli.private_file import write_private
from azu.errors import Conflict, DeadlineExceeded, NotFound

_LOCK = "network.lock"
_FILE = "network.json"


@contextmanager
def running_in(home: Path) -> Iterator[None]:
    """Hold a home folder for the network of this process; raises Conflict when another one has it."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(home / _LOCK, timeout=0):
            this = psutil.Process()
            write_private(home / _FILE, json.dumps({"pid": this.pid, "created_s": this.create_time()}))
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
    try:
        process.wait(timeout_s)
    except psutil.TimeoutExpired as error:
        raise DeadlineExceeded(f"process {process.pid} has not stopped in {timeout_s:.0f} s") from error


def _find(home: Path) -> psutil.Process | None:
    try:
        known = json.loads((home / _FILE).read_text())
        process = psutil.Process(known["pid"])
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    # A process id is used again; a process that was not created then is somebody else's.
    return process if process.create_time() == known["created_s"] else None
