"""The one process that runs a network out of a home folder: locked, found, watched, put in the background."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from rich.console import Console
from rich.text import Text

from azu.errors import AzuError, ConfigurationError, Conflict, DeadlineExceeded, NotFound, Unavailable
from azu.files import read_json, write_private
from azu.launch.formats import check_home, mark_home
from azu.launch.processes import Patience, StopSignal, azu_command
from azu.printable import printable
from azu.supervision import FAULTS_IN_A_ROW

_LOCK = "network.lock"
_FILE = "network.json"
_BACKGROUND = "--background"
_WATCH_S = 1.0
_POLL_S = 0.05
_LAST_OUTPUT_CHARS = 2000


@dataclass(frozen=True, slots=True)
class _NetworkProcess:
    """The process that runs a network, and when it was created: a process id is used again."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    pid: Annotated[int, Field(gt=0, lt=2**31)]
    created_s: float


_FORMAT = TypeAdapter(_NetworkProcess)


@contextmanager
def home_locked(home: Path) -> Iterator[None]:
    """Hold a home folder for the network of this process; raises Conflict when another process holds it.

    Raises ConfigurationError, and has written nothing, where a later release of azu wrote the folder.
    """
    check_home(home)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(home / _LOCK, timeout=0):
            mark_home(home)
            process = psutil.Process()
            known = _NetworkProcess(process.pid, process.create_time())
            write_private(home / _FILE, _FORMAT.dump_json(known).decode())
            try:
                yield
            finally:
                (home / _FILE).unlink(missing_ok=True)
    except Timeout as error:
        raise Conflict(f"a network already runs in {home}; `azu down` stops it") from error


def watch(revive: Callable[[], list[str]], stop: StopSignal) -> None:
    """Start again what ends, and print its name, until a stop signal arrives or `revive` raises an AzuError.

    Any other exception is printed, and raised the fifth time in a row.
    """
    console = Console(stderr=True, highlight=False)
    faults = 0
    while True:
        try:
            revived = revive()
        except AzuError:
            raise
        except Exception as error:
            faults += 1
            if faults == FAULTS_IN_A_ROW:
                raise
            revived = []
            told = f"what had ended was not started again: {type(error).__name__}: {error}"
            console.print(Text(printable(told), "red"))
        else:
            faults = 0
        for name in revived:
            console.print(Text(f"{name} had ended and was started again", "yellow"))
        stop.check()
        time.sleep(_WATCH_S)


def run_in_background(
    home: Path,
    timeout_s: float,
    command: Sequence[str] | None = None,
    name: str = "background",
    step: Callable[[str], None] = lambda _: None,
) -> Any:
    """Run a command in the background, this process's own by default; return the facts that it prints once
    it is up.

    The rest of its output goes to a file of this name in the home's logs; `step` gets each line of it. Raises
    Unavailable with the end of that output when the command ends before it is up, DeadlineExceeded when it
    takes too long.
    """
    arguments = [word for word in (sys.argv[1:] if command is None else command) if word != _BACKGROUND]
    arguments += [] if "--json" in arguments else ["--json"]
    log, printed = home / "logs" / f"{name}.log", home / f"{name}.json"
    # Only the owner may read them: the facts hold secrets, such as the admin key.
    for file in (log, printed):
        write_private(file, "")
    with printed.open("w") as output, log.open("w") as errors:
        process = subprocess.Popen(
            azu_command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=dict(os.environ),
            start_new_session=True,
        )
    try:
        facts = _facts(process, log, printed, Patience(timeout_s), step)
    except BaseException:
        process.terminate()  # also where the user gives it up
        raise
    if "error" in facts:
        raise Unavailable(facts["error"]["message"])
    return facts


def _facts(
    process: "subprocess.Popen[bytes]",
    log: Path,
    printed: Path,
    patience: Patience,
    step: Callable[[str], None],
) -> Any:
    """Wait for the facts that a command prints."""
    told = 0
    while not (text := printed.read_text()).endswith("\n"):
        lines = log.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        for line in whole[told:]:
            step(line.rstrip())
        told = len(whole)
        if process.poll() is not None:
            raise Unavailable(f"it ended before it was up: {_last_output(log, printed)}")
        if patience.is_over:
            raise DeadlineExceeded(f"it was not up {patience}: {_last_output(log, printed)}")
        time.sleep(_POLL_S)
    return json.loads(text)


def _last_output(log: Path, printed: Path) -> str:
    return (log.read_text() + printed.read_text())[-_LAST_OUTPUT_CHARS:].strip() or f"nothing in {log}"


def stop_network(home: Path, timeout_s: float) -> None:
    """Stop the network of a home folder, and wait until its process has ended.

    Raises NotFound when none runs, DeadlineExceeded when it does not stop.
    """
    process = running_network(home)
    process.terminate()
    deadline = time.monotonic() + timeout_s
    while not _has_ended(process):
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"process {process.pid} has not stopped in {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def running_network(home: Path) -> psutil.Process:
    """Return the process that runs the network of a home folder; raises NotFound when none runs."""
    process = _find(home)
    if process is None:
        raise NotFound(f"no network runs in {home}")
    return process


def _find(home: Path) -> psutil.Process | None:
    path = home / _FILE
    try:
        known = _FORMAT.validate_python(read_json(path)) if path.exists() else None
        process = psutil.Process(known.pid) if known else None
    except psutil.NoSuchProcess:
        return None
    except ValidationError as error:
        raise ConfigurationError(f"{path} is damaged; remove it once no network runs there") from error
    return process if known and process and process.create_time() == known.created_s else None


def _has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, even if its parent has not waited for it yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
