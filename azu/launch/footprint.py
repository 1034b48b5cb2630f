"""What the processes of a network take of their machine: processor time, memory, ports."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import psutil

# The titles of Ray's and Serve's own processes begin so; an idle one holds no actor of azu's yet.
_OF_RAY = (
    "ray start",
    "gcs_server",
    "raylet",
    "ray::IDLE",
    "ray::ProxyActor",
    "ray::ServeController",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "ray-dashboard",
)
_RAY_START = "ray_start.py"


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """One process: its title, its processor time since its start in s, and its resident memory in bytes.

    `listens` has the addresses and ports at which it takes connections by TCP.
    """

    pid: int
    title: str
    cpu_s: float
    rss_bytes: int
    listens: tuple[tuple[str, int], ...]

    @property
    def is_of_ray(self) -> bool:
        """Whether it is one of Ray's or Serve's own, and not of azu."""
        return self.title.startswith(_OF_RAY)


def uses_of(network: psutil.Process) -> list[ProcessUse]:
    """Return the processes of a network: the one that runs it, and all that came from it."""
    return [use for one in (network, *network.children(recursive=True)) for use in _use(one)]


def _use(process: psutil.Process) -> Iterator[ProcessUse]:
    with suppress(psutil.Error):  # it ended, or belongs to another user
        times = process.cpu_times()
        opened = process.net_connections("tcp")
        yield ProcessUse(
            process.pid,
            _title(process),
            times.user + times.system,
            process.memory_info().rss,
            tuple(sorted({_place(one.laddr) for one in opened if one.status == psutil.CONN_LISTEN})),
        )


def _place(address: Any) -> tuple[str, int]:
    """Return an address and its port; what takes IPv4 through IPv6 counts as IPv4."""
    return address.ip.removeprefix("::ffff:"), address.port


def _title(process: psutil.Process) -> str:
    """Return a process's title; of one of Python's without a title, its program and first argument."""
    command = process.cmdline()
    names = [PurePath(word).name for word in command]
    if _RAY_START in names:
        return "ray start"
    for program in ("azu", "azu.cli"):
        if program in names[:-1]:
            return f"azu {command[names.index(program) + 1]}"
    scripts = [name for name in names if name.endswith(".py")]
    return scripts[0] if scripts else process.name()
