"""Which process runs a network out of a home folder: at most one, and `azu down` finds it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from rich.console import Console

from azu.errors import ConfigurationError, Conflict, DeadlineExceeded, NotFound, Unavailable
from azu.files import read_json, write_private
from azu.launch.processes import StopSignal, azu_command

_LOCK = "network.lock"
_FILE = "network.json"
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _NetworkProcess:
    """The process that runs a network; it was created then."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    pid: Annotated[int, Field(gt=0, lt=2**31)]
    created_s: float


_RUNNING = TypeAdapter(_NetworkProcess)


@contextmanager
def running_in(home: Path) -> Iterator[None]:
    """Hold a home folder for the network of this process; raises Conflict when another one has it."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(home / _LOCK, timeout=0):
            this = psutil.Process()
            write_private(
                home / _FILE, _RUNNING.dump_json(_NetworkProcess(this.pid, this.create_time())).decode()
            )
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


OPTION = "--background"
_START_POLL_S = 0.1
_TAIL_CHARS = 2000


def in_background(home: Path, timeout_s: float) -> Any:
    """Start this process's own command again without the option, and return what it shows once it is up.

    What else it says goes to logs/background.log in the home folder. Raises Unavailable with its last words
    when it ends before, DeadlineExceeded when it takes too long.
    """
    arguments = [word for word in sys.argv[1:] if word != OPTION]
    arguments += [] if "--json" in arguments else ["--json"]
    log, shown = home / "logs" / "background.log", home / "background.json"
    # There are secrets in what it shows, such as the admin's key.
    for file in (log, shown):
        write_private(file, "")
    with shown.open("w") as output, log.open("w") as errors:
        process = subprocess.Popen(
            azu_command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=dict(os.environ),
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout_s
    while not (told := shown.read_text()).endswith("\n"):
        if process.poll() is not None:
            raise Unavailable(f"it ended before it was up: {_last_words(log, shown)}")
        if time.monotonic() > deadline:
            process.terminate()
            raise DeadlineExceeded(f"it was not up in {timeout_s:.0f} s: {_last_words(log, shown)}")
        time.sleep(_START_POLL_S)
    facts = json.loads(told)
    if "error" in facts:
        raise Unavailable(facts["error"]["message"])
    return facts


def _last_words(log: Path, shown: Path) -> str:
    return (log.read_text() + shown.read_text())[-_TAIL_CHARS:].strip() or f"nothing in {log}"


_WATCH_S = 1.0


def watch(revive: Callable[[], list[str]], ending: StopSignal) -> None:
    """Start again what dies, and say so, until Ctrl-C or until `revive` raises."""
    console = Console(stderr=True, highlight=False)
    while True:
        for name in revive():
            console.print(f"[yellow]{name} had ended and was started again[/]")
        ending.check()
        time.sleep(_WATCH_S)
