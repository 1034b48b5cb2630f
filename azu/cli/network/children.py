"""Children that stand and fall together: started, waited for, started again, stopped."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from azu.cli.network.interrupts import interrupts_held
from azu.cli.network.processes import Child, Command
from azu.errors import DeadlineExceeded, Unavailable

STOP_TIMEOUT_S = 10.0
_POLL_S = 0.05
_FIRST_RESTART_S = 0.5
_LAST_RESTART_S = 30.0
# Whoever lived this long starts again at once the next time.
_STEADY_S = 60.0


class Children:
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

    def start(self, command: Command) -> None:
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
