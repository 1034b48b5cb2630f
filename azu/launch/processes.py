"""Processes that this process starts: watched, started again when they end, and stopped together.

Also what such a process needs around it: signals, environment variables, ports and addresses.
"""

import ctypes
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import psutil

from azu.errors import AzuError, DeadlineExceeded, Unavailable
from azu.launch.unix_users import UnixUser
from azu.units import MIB

log = logging.getLogger(__name__)

# Set for a process that has its control pipe as standard input.
CONTROL_PIPE = "AZU_CONTROL_PIPE"

STOP_TIMEOUT_S = 10.0
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.05
_FIRST_RESTART_S = 0.5
_LAST_RESTART_S = 30.0
# A process that lived this long is started again without the longer delays of earlier restarts.
_STEADY_S = 60.0
_LAST_OUTPUT_CHARS = 2000
_MAX_LOG_BYTES = 16 * MIB
# Linux gives those above to connections and to servers that take any, Ray those below to its processes.
_FREE_PORTS = range(20_000, 32_768)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
# Looked up before any fork: between fork and exec nothing may be imported.
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to start, and whether it is started again when it ends.

    `each_start` returns variables that differ from start to start; it may raise an AzuError, and the process
    is started later then.
    """

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    restart: bool = False
    each_start: Callable[[], Mapping[str, str]] = dict

    def starting(self) -> "ProcessSpec":
        """Return what to start this time; raises what `each_start` does."""
        return replace(self, environment={**self.environment, **self.each_start()})


def azu_command(*arguments: str) -> tuple[str, ...]:
    """Return the arguments of a process that runs one of azu's commands."""
    # -P: nothing in the working directory is imported in place of a package.
    return (sys.executable, "-P", "-m", "azu.cli", *arguments)


class ProcessGroup:
    """Child processes that log to files in one folder; leaving the context stops all of them.

    They run as another `user` if one is named, which only root can start.
    """

    def __init__(
        self, logs: Path, *, user: UnixUser | None = None, stop_timeout_s: float = STOP_TIMEOUT_S
    ) -> None:
        self._logs = logs
        self._user = user
        self._stop_timeout_s = stop_timeout_s
        self._children: dict[str, _Child] = {}
        self._restarts: dict[str, _Restart] = {}
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, spec: ProcessSpec) -> None:
        """Start a process whose name no other process of the group has; it may not be ready yet.

        Call it from a thread that lives as long as the process: the kernel ends both together.
        """
        assert spec.name not in self._children, spec.name
        starting = spec.starting()
        # An interrupt between the fork and the assignment would leave a process that the group does not stop.
        with interrupts_held():
            self._children[spec.name] = _Child(starting, self._logs / f"{spec.name}.log", self._user)

    def wait_until(self, name: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until a process is ready.

        Raises Unavailable when it ends before, DeadlineExceeded when it takes too long, both with the end of
        its output.
        """
        child = self._children[name]
        patience = Patience(timeout_s)
        while not ready():
            if child.ended:
                raise Unavailable(f"{name} ended before it was ready: {child.last_output()}")
            if patience.is_over:
                raise DeadlineExceeded(f"{name} was not ready {patience}: {child.last_output()}")
            time.sleep(_POLL_S)

    def wait_until_printed(self, name: str, pattern: str, timeout_s: float) -> None:
        """Wait until a process has printed a line that matches; raises as `wait_until` does."""
        self.wait_until(name, lambda: self.has_printed(name, pattern), timeout_s)

    def has_printed(self, name: str, pattern: str) -> bool:
        """Return whether a process has printed a line that matches since it was last started."""
        return re.search(pattern, self._children[name].output(), re.MULTILINE) is not None

    def pid(self, name: str) -> int:
        """Return a process's id."""
        return self._children[name].pid

    def ended(self) -> list[str]:
        """Return the names of the processes that have ended."""
        return [name for name, child in self._children.items() if child.ended]

    def revive(self) -> list[str]:
        """Start again the processes that ended and whose delay is over; returns their names.

        The delay grows each time a process ends soon after its start. A log that is full is moved aside.
        """
        for child in self._children.values():
            child.limit_log()
        revived = []
        for name in self.ended():
            child = self._children[name]
            if not child.spec.restart:
                continue
            restart = self._restarts.setdefault(name, _Restart())
            if restart.due_s is None:
                restart.schedule(lived_s=child.age_s)
            elif time.monotonic() >= restart.due_s:
                restart.due_s = None
                if self._start_again(child, restart):
                    revived.append(name)
        return revived

    def _start_again(self, child: "_Child", restart: "_Restart") -> bool:
        """Start a process that ended; False where that fails now, and its end is found again."""
        name = child.spec.name
        try:
            child.kill()
            del self._children[name]
            self.start(child.spec)
        except (AzuError, OSError) as error:
            self._children[name] = child
            if str(error) != restart.failed:
                log.warning("%s cannot be started again now: %s", name, error)
            restart.failed = str(error)
            return False
        restart.failed = ""
        return True

    def restart(self, name: str) -> None:
        """Stop a process and everything it started, and start it again."""
        with interrupts_held():
            child = self._children[name]
            child.terminate()
            deadline = time.monotonic() + self._stop_timeout_s
            while time.monotonic() < deadline and not child.ended:
                time.sleep(_POLL_S)
            # Where it fails, `revive` starts it later.
            self._start_again(child, self._restarts.setdefault(name, _Restart()))

    def stop(self) -> None:
        """Stop every process and everything it started: SIGTERM first, SIGKILL after the timeout."""
        with interrupts_held():
            for child in self._children.values():
                child.terminate()
            deadline = time.monotonic() + self._stop_timeout_s
            while time.monotonic() < deadline and len(self.ended()) < len(self._children):
                time.sleep(_POLL_S)
            while self._children:
                _, child = self._children.popitem()
                child.kill()


class Patience:
    """How long a start is waited for: some seconds on an idle machine, and longer on a busy one."""

    def __init__(
        self,
        timeout_s: float,
        now: Callable[[], float] = time.monotonic,
        load: Callable[[], float] = lambda: os.getloadavg()[0],
    ) -> None:
        self._timeout_s = timeout_s
        self._now = now
        self._load = load
        self._started_s = now()
        self._most = 1.0

    @property
    def is_over(self) -> bool:
        """Whether it took longer than that, by the highest load so far for each core."""
        self._most = max(self._most, self._load() / (os.cpu_count() or 1))
        return self._now() - self._started_s > self._timeout_s * self._most

    def __str__(self) -> str:
        return f"in {self._now() - self._started_s:.0f} s"


@dataclass(slots=True)
class _Restart:
    """When a process that ended is started again, and why that failed; `due_s` is None while it lives."""

    delay_s: float = 0.0
    due_s: float | None = None
    failed: str = ""

    def schedule(self, *, lived_s: float) -> None:
        """Set the time of the next start, with a longer delay if the process ended soon again."""
        young = lived_s < _STEADY_S and self.delay_s > 0
        self.delay_s = min(2 * self.delay_s, _LAST_RESTART_S) if young else _FIRST_RESTART_S
        self.due_s = time.monotonic() + self.delay_s


class _Child:
    """A process in a session of its own. Everything that it starts is in that session and can be ended."""

    def __init__(self, spec: ProcessSpec, log: Path, user: UnixUser | None) -> None:
        self.spec = spec
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._started_s = time.monotonic()
        parent = os.getpid()
        # Another user writes to the log through this descriptor, and cannot open the file.
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                spec.arguments,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # It runs after the change of the user, which would undo it.
                preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509 - two system calls, nothing that locks
                **_as_user(user, spec.environment),
            )
        finally:
            os.close(descriptor)

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its session."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process itself has ended; processes that it started may still run."""
        if self._process.returncode is not None:
            return True
        # It stays a zombie, and the id of its session taken, until `kill` has emptied the session.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    @property
    def age_s(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._started_s

    def limit_log(self) -> None:
        """Copy a full log in place of the copy before, and empty it: the process goes on writing to it.

        A disk that has no room for the copy has some afterwards. A log that was removed is left alone.
        """
        with suppress(FileNotFoundError):
            if self._log.stat().st_size > _MAX_LOG_BYTES:
                with suppress(OSError):
                    shutil.copy(self._log, self._log.with_name(f"{self._log.name}.1"))
                os.truncate(self._log, 0)
                self._log_start = 0

    def output(self) -> str:
        """Return what the process has printed since it was started, or since its log was emptied."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def last_output(self) -> str:
        """Return the end of the output, for an error message."""
        return self.output()[-_LAST_OUTPUT_CHARS:].strip() or f"nothing in {self._log}"

    def terminate(self) -> None:
        """Send SIGTERM to the process, which ends what it started itself."""
        if not self.ended:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill every process of the session and wait until all of them have ended."""
        if self._process.returncode is not None:
            return  # another session may have the id now
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while members := session_members(self.pid):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{self.spec.name}: {members} do not end")
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self._process.wait()


def _as_user(user: UnixUser | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the options with which `Popen` starts a process as a user."""
    if user is None:
        return {"env": dict(environment), "stdin": subprocess.DEVNULL}
    return {
        "env": user.environment(environment) | {CONTROL_PIPE: "stdin"},
        # This process holds the other end until it ends.
        "stdin": subprocess.PIPE,
        **user.popen_options(),
    }


def end_with_parent() -> None:
    """End this process as soon as its control pipe closes; one without a control pipe is left alone.

    The kernel ends a child with its parent too, but forgets that when the child changes its credentials.
    """
    if os.environ.pop(CONTROL_PIPE, None) is not None:
        threading.Thread(target=_end_with_pipe, name="control-pipe", daemon=True).start()


def _end_with_pipe() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; runs in the child between fork and exec."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def session_members(session_id: int) -> list[int]:
    """Return the ids of a session's running processes, without zombies."""
    return [pid for pid in psutil.pids() if _is_member(pid, session_id)]


def _is_member(pid: int, session_id: int) -> bool:
    try:
        return os.getsid(pid) == session_id and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


class StopSignal:
    """Whether a signal to stop has arrived.

    A KeyboardInterrupt that is raised while a finalizer or a callback of Ray runs is printed there and lost;
    `check` raises it again.
    """

    def __init__(self) -> None:
        self._arrived = False

    def interrupt(self, _: int, __: FrameType | None) -> None:
        """Raise KeyboardInterrupt; this is the signal handler."""
        self._arrived = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self._arrived:
            raise KeyboardInterrupt


@contextmanager
def stop_signals_raised() -> Iterator[StopSignal]:
    """Have SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, so that the block ends in order."""
    stop = StopSignal()
    with _handled_by(stop.interrupt):
        yield stop


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGHUP during the block; one that came is raised after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def record(number: int, _: FrameType | None) -> None:
        arrived.append(number)

    try:
        with _handled_by(record):
            yield
    finally:
        if arrived:
            signal.raise_signal(arrived[0])


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Set this process's signal handlers again after the block: connecting to Ray replaces them."""
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


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process during the block."""
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


def free_port(preferred: int = 0) -> int:
    """Return a TCP port that no process listens on now, the preferred one if it is free; bind it soon."""
    port = preferred or secrets.choice(_FREE_PORTS)
    with socket.socket() as probe:
        # Connections that ended a moment ago do not keep a server from its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))  # a listener at any address has it
        except OSError:
            return free_port()
    return port


def own_addresses() -> frozenset[str]:
    """Return this machine's addresses."""
    return frozenset(one.address.partition("%")[0] for one in _interfaces())


def own_network(ip: str) -> str | None:
    """Return the range (CIDR) of the network of one of this machine's addresses; None where it is alone."""
    for one in _interfaces():
        if one.address.partition("%")[0] == ip and one.netmask:
            length = int(ip_address(one.netmask)).bit_count()
            network = ip_network(f"{ip}/{length}", strict=False)
            return str(network) if network.num_addresses > 1 else None
    return None


def _interfaces() -> Iterator[Any]:
    for addresses in psutil.net_if_addrs().values():
        yield from (one for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6))


def address_towards(url: str) -> str:
    """Return this machine's address on the route to a URL's host; raises Unavailable if there is no route."""
    target = urlsplit(url)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # No packet is sent: connecting a UDP socket only chooses the route.
            probe.connect((target.hostname or "", target.port or 443))
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise Unavailable(f"there is no way from this machine to {url}: {error}") from error
