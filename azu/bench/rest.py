"""A network at rest: the processor time and the memory of azu's processes, apart from Ray's own."""

import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from azu.bench.model import ModelShape
from azu.bench.report import Measurement, Measurements, call_apart
from azu.launch.footprint import ProcessUse, uses_of
from azu.launch.local_network import demo_network
from azu.units import MIB

_TIMEOUT_S = 600.0
# After its start a network still imports what it will need.
_SETTLES_S = 45.0
_SECONDS = 60.0


def measure_rest(_shape: ModelShape) -> Measurements:
    """Return what the demo's network takes, with three workers and no job: parts of a core, memory."""
    return call_apart(_TIMEOUT_S, _measured)


def _measured() -> Measurements:
    os.environ.pop("RAY_AUTH_TOKEN", None)  # of the other measurements' clusters
    with tempfile.TemporaryDirectory(prefix="azu-") as home, demo_network(Path(home), lambda _: None):
        time.sleep(_SETTLES_S)
        return at_rest(psutil.Process(), _SECONDS)


def at_rest(network: psutil.Process, seconds: float) -> Measurements:
    """Return what the processes of a network that runs take within some seconds."""
    before, started = {use.pid: use for use in uses_of(network)}, time.monotonic()
    time.sleep(seconds)
    uses, took_s = uses_of(network), time.monotonic() - started
    figures = []
    for whose, is_of_ray in (("azu's", False), ("Ray's", True)):
        own = [use for use in uses if use.is_of_ray is is_of_ray]
        cpu, memory = defaultdict[str, float](float), defaultdict[str, float](float)
        for use in own:
            cpu[use.title] += 100 * _spent_s(use, before) / took_s
            memory[use.title] += use.rss_bytes / MIB
        figures += [
            Measurement(
                f"processor time at rest of {whose} {len(own)} processes", "%", sum(cpu.values()), 100.0,
                "one core", at_most=None if is_of_ray else 0.03, notes=_most_first(cpu),
            ),
            Measurement(
                f"memory at rest of {whose} {len(own)} processes", "MiB", sum(memory.values()),
                psutil.virtual_memory().total / MIB, "the machine", notes=_most_first(memory),
            ),
        ]  # fmt: skip
    return figures


def _most_first(figures: dict[str, float]) -> dict[str, float]:
    return dict(sorted(figures.items(), key=lambda one: -one[1]))


def _spent_s(use: ProcessUse, before: dict[int, ProcessUse]) -> float:
    return use.cpu_s - before[use.pid].cpu_s if use.pid in before else use.cpu_s
