"""Children that stand and fall together: started, waited for, started again, stopped."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self
from urllib.parse import urlsplit

import psutil

from azu.errors import DeadlineExceeded, Unavailable

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for the length of the block; they arrive after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    try:
        with _handled_by(note):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


class StopSignal:
    """Whether somebody asked a block to end.

    An interrupt that came while a finalizer or a callback of Ray's ran is printed there and forgotten.
    """

    def __init__(self) -> None:
        self._asked = False

    def interrupt(self, _: int, __: FrameType | None) -> None:
        """Interrupt whatever runs; a signal handler."""
        self._asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt once more if one came."""
        if self._asked:
            raise KeyboardInterrupt


@contextmanager
def ending_as_interrupt() -> Iterator[StopSignal]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that whatever it started is stopped."""
    ending = StopSignal()
    with _handled_by(ending.interrupt):
        yield ending


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put this process's handlers back after the block: connecting to Ray replaces them by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


_PR_SET_PDEATHSIG = 1
# Looked up before any fork: between fork and exec nothing may be imported.
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None
_TAIL_BYTES = 2000
_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to start, and whether it is started again when it dies."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    restart: bool = False


class Child:
    """A running command. Its session holds whatever it starts in turn, so that nothing can be left behind.

    Start children from a thread that lives as long as they do: the kernel ends them with it.
    """

    def __init__(self, command: ProcessSpec, log: Path) -> None:
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


STOP_TIMEOUT_S = 10.0
_POLL_S = 0.05
_FIRST_RESTART_S = 0.5
_LAST_RESTART_S = 30.0
# Whoever lived this long starts again at once the next time.
_STEADY_S = 60.0


class ProcessGroup:
    """A group of child processes; leaving the context stops all of them at once."""

    def __init__(self, logs: Path, *, stop_timeout_s: float = STOP_TIMEOUT_S) -> None:
        self._logs = logs
        self._stop_timeout_s = stop_timeout_s
        self._living: dict[str, Child] = {}
        self._restarts: dict[str, _Restart] = {}
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, command: ProcessSpec) -> None:
        """Start a command whose name no other child has; it may not be ready yet."""
        assert command.name not in self._living, command.name
        # An interrupt between the fork and the next line would leave a child that nobody knows.
        with interrupts_held():
            self._living[command.name] = Child(command, self._logs / f"{command.name}.log")

    def wait_until(self, name: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until a child is ready.

        Raises Unavailable when it ends before, DeadlineExceeded when it takes too long, both with its last
        words.
        """
        child = self._living[name]
        deadline = time.monotonic() + timeout_s
        while not ready():
            if child.ended:
                raise Unavailable(f"{name} ended before it was ready: {child.last_words()}")
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{name} was not ready in {timeout_s:.0f} s: {child.last_words()}")
            time.sleep(_POLL_S)

    def wait_until_said(self, name: str, pattern: str, timeout_s: float) -> None:
        """Wait until a child has printed a line that matches; raises as `wait_until` does."""
        self.wait_until(name, lambda: self.said(name, pattern), timeout_s)

    def said(self, name: str, pattern: str) -> bool:
        """Say whether a child has printed a line that matches since it was last started."""
        return re.search(pattern, self._living[name].output(), re.MULTILINE) is not None

    def pid(self, name: str) -> int:
        """Return a child's process id."""
        return self._living[name].pid

    def ended(self) -> list[str]:
        """Return the names of those that are gone."""
        return [name for name, child in self._living.items() if child.ended]

    def revive(self) -> list[str]:
        """Start again who died and is due, later each time it dies young; returns who was started."""
        revived = []
        for name in self.ended():
            child = self._living[name]
            if not child.command.restart:
                continue
            restart = self._restarts.setdefault(name, _Restart())
            if restart.due_s is None:
                restart.plan(lived_s=child.age_s)
            elif time.monotonic() >= restart.due_s:
                restart.due_s = None
                self._living.pop(name).kill()
                self.start(child.command)
                revived.append(name)
        return revived

    def stop(self) -> None:
        """Stop every child and everything it started; SIGTERM first, SIGKILL after the grace period."""
        with interrupts_held():
            for child in self._living.values():
                child.terminate()
            deadline = time.monotonic() + self._stop_timeout_s
            while time.monotonic() < deadline and len(self.ended()) < len(self._living):
                time.sleep(_POLL_S)
            while self._living:
                _, child = self._living.popitem()
                child.kill()


@dataclass(slots=True)
class _Restart:
    """When a child that died is started again; None while it lives."""

    delay_s: float = 0.0
    due_s: float | None = None

    def plan(self, *, lived_s: float) -> None:
        """Wait longer each time it dies young."""
        young = lived_s < _STEADY_S and self.delay_s > 0
        self.delay_s = min(2 * self.delay_s, _LAST_RESTART_S) if young else _FIRST_RESTART_S
        self.due_s = time.monotonic() + self.delay_s


def azu_command(*arguments: str) -> tuple[str, ...]:
    """Return the arguments of a process that runs one of azu's commands."""
    # -P: nothing in the working directory is imported in place of a package.
    return (sys.executable, "-P", "-m", "azu.cli", *arguments)


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for the length of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def free_port() -> int:
    """Return a TCP port that nobody listens on now; bind it soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def address_towards(url: str) -> str:
    """Return the address of this machine that packets to a URL's host leave from; raises Unavailable."""
    target = urlsplit(url)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the kernel only chooses the way.
            probe.connect((target.hostname or "", target.port or 443))
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise Unavailable(f"there is no way from this machine to {url}: {error}") from error
