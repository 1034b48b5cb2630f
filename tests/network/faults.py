"""Unexpected exceptions inside a network's processes, raised once where and when a test says.

The product knows nothing of this. Every Python process that a test starts imports `sitecustomize` from a
folder that the test puts on PYTHONPATH; it wraps the methods that the folder's list names. A wrapped method
raises when it finds a file with its name, and deletes it.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

_POLL_S = 0.02
# Runs in every process of the network: it imports nothing of the tests.
_SITE = '''
import functools, importlib.machinery, inspect, json, os, sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(FOLDER, "methods.json")) as file:
    METHODS = json.load(file)


class Struck(Exception):
    """What no code of azu expects."""


def strike(name):
    armed = os.path.join(FOLDER, "armed", name)
    try:
        with open(armed) as file:
            if file.read() not in ("", str(os.getpid())):
                return
        os.unlink(armed)
    except OSError:
        return
    struck = os.path.join(FOLDER, "struck", name)
    with open(struck + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.replace(struck + ".new", struck)
    raise Struck(name)


def wrapped(name, method):
    if inspect.iscoroutinefunction(method):
        @functools.wraps(method)
        async def struck(*arguments, **named):
            strike(name)
            return await method(*arguments, **named)
    else:
        @functools.wraps(method)
        def struck(*arguments, **named):
            strike(name)
            return method(*arguments, **named)
    return struck


def wrap(module):
    for class_name, methods in METHODS[module.__name__].items():
        cls = getattr(module, class_name)
        is_actor = False
        for method in methods:
            found = vars(cls)[method]
            # Inside of what an actor puts around its methods, where an exception of their own is raised.
            is_actor |= hasattr(found, "__wrapped__")
            setattr(cls, method, wrapped(f"{class_name}.{method}", inspect.unwrap(found)))
        if is_actor:
            sys.modules["actors.links"].raises_known_errors(cls)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in METHODS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            execute = spec.loader.exec_module
            def exec_module(module):
                execute(module)
                wrap(module)
            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
'''


@dataclass(frozen=True)
class Faults:
    """The folder through which a test has methods raise. Methods are named `module:Class.method`."""

    folder: Path

    @classmethod
    def installed(cls, folder: Path, methods: Iterable[str], environment: pytest.MonkeyPatch) -> "Faults":
        """Have every process that starts from now on wrap these methods."""
        listed: dict[str, dict[str, list[str]]] = {}
        for one in methods:
            module, _, name = one.partition(":")
            class_name, _, method = name.partition(".")
            listed.setdefault(module, {}).setdefault(class_name, []).append(method)
        for name in ("armed", "struck"):
            (folder / name).mkdir(parents=True)
        (folder / "methods.json").write_text(json.dumps(listed))
        (folder / "sitecustomize.py").write_text(_SITE)
        path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment.setenv("PYTHONPATH", os.pathsep.join(path))
        assert "sitecustomize" not in sys.modules or not hasattr(sys.modules["sitecustomize"], "METHODS")
        return cls(folder)

    def arm(self, method: str, pid: int | None = None) -> None:
        """Have the next call of a method raise, in this process or in whichever it comes first."""
        self._struck(method).unlink(missing_ok=True)
        # Renamed into place: a process never reads half of it.
        new = self.folder / "armed.new"
        new.write_text("" if pid is None else str(pid))
        new.replace(self._armed(method))

    def disarm(self, method: str) -> None:
        """Have a method raise no more."""
        self._armed(method).unlink(missing_ok=True)

    def has_struck(self, method: str) -> bool:
        """Return whether a method has raised since it was armed."""
        return self._struck(method).exists()

    def wait_until_struck(self, method: str, timeout_s: float) -> int:
        """Wait until a method has raised, and return the id of the process."""
        deadline_s = time.monotonic() + timeout_s
        while not self.has_struck(method):
            assert time.monotonic() < deadline_s, f"{method} was not called"
            time.sleep(_POLL_S)
        return int(self._struck(method).read_text())

    def _armed(self, method: str) -> Path:
        return self.folder / "armed" / method.partition(":")[2]

    def _struck(self, method: str) -> Path:
        return self.folder / "struck" / method.partition(":")[2]
