"""One child process: in a session of its own, with a log of its own, never outliving its parent."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from azu.errors import DeadlineExceeded

_PR_SET_PDEATHSIG = 1
# Looked up before any fork: between fork and exec nothing may be imported.
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None
_TAIL_BYTES = 2000
_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Command:
    """What to start, and whether it is started again when it dies."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    restart: bool = False


class Child:
    """A running command. Its session holds whatever it starts in turn, so that nothing can be left behind.

    Start children from a thread that lives as long as they do: the kernel ends them with it.
    """

    def __init__(self, command: Command, log: Path) -> None:
        self.command = command
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._started_s = time.monotonic()
        parent = os.getpid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                command.arguments,
                env=dict(command.environment),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509 - two system calls, nothing that locks
            )
        finally:
            os.close(descriptor)

    @property
    def pid(self) -> int:
        """The process id, which is also its session's."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the command itself is gone; what it started may still be there."""
        # It stays a zombie, and its session's id taken, until `kill` has emptied the session.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    @property
    def age_s(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._started_s

    def output(self) -> str:
        """Return what the command printed since it was started."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def last_words(self) -> str:
        """Return the end of what it printed, for an error message."""
        return self.output()[-_TAIL_BYTES:].strip() or f"nothing in {self._log}"

    def terminate(self) -> None:
        """Ask the command to end; it takes what it started with it."""
        if not self.ended:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End everything in the session and wait until it is gone."""
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while members := session_members(self.pid):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{self.command.name}: {members} do not end")
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self._process.wait()


def session_members(session_id: int) -> list[int]:
    """Return the living processes of a session, without zombies."""
    return [pid for pid in psutil.pids() if _is_member(pid, session_id)]


def _is_member(pid: int, session_id: int) -> bool:
    try:
        return os.getsid(pid) == session_id and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; runs in the child between fork and exec."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
