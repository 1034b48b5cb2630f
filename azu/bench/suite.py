"""All measurements, in the order they are run."""

import os
import secrets
import time
from collections.abc import Callable, Sequence
from importlib import import_module

from azu.bench.model import ModelShape
from azu.bench.report import BenchReport, Measured, Measurements
from azu.errors import InvalidRequest
from azu.launch.processes import variables_set
from azu.launch.ray_nodes import LARGE_PAGES

# Each measurement is the function `measure_<name>` of the module named here.
MEASUREMENTS = {
    "settling": "micro",
    "sharding": "micro",
    "hop": "micro",
    "tls": "micro",
    "one_stream": "streams",
    "many_streams": "streams",
    "first_token": "streams",
    "input_log": "micro",
    "sampling": "micro",
    "edge": "edge",
    "rest": "rest",
}
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    # As azu's own nodes are started.
    "RAY_worker_niceness": "0",
    **LARGE_PAGES,
}


def run_bench(
    only: Sequence[str], shape: ModelShape, progress: Callable[[str], None] = lambda _: None
) -> BenchReport:
    """Run the measurements named, or all; raises InvalidRequest for a name that is no measurement."""
    if unknown := set(only) - set(MEASUREMENTS):
        raise InvalidRequest(
            f"there is no measurement {min(unknown)!r}: {', '.join(MEASUREMENTS)}", param="only"
        )
    measured = []
    # Ray reads some of it when it is imported, which a measurement does first.
    with variables_set(RAY_ENVIRONMENT):
        for name in (name for name in MEASUREMENTS if not only or name in only):
            progress(f"Measuring {name.replace('_', ' ')}")
            module = import_module(f"azu.bench.{MEASUREMENTS[name]}")
            load, started = os.getloadavg()[0], time.monotonic()
            figures: Measurements = getattr(module, f"measure_{name}")(shape)
            measured.append(Measured(name, figures, load, round(time.monotonic() - started, 1)))
    return BenchReport(os.cpu_count() or 1, tuple(measured))
