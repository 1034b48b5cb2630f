"""All measurements, in the order they are run; another is a module here with a function `measure`."""

import os
import secrets
import time
from collections.abc import Callable, Sequence
from importlib import import_module

from azu.cli.bench.results import BenchReport, Figure, Measured
from azu.cli.network.environment import variables_set
from azu.cli.network.ray_nodes import LARGE_PAGES
from azu.engine.reference import ModelShape
from azu.errors import InvalidRequest

MEASUREMENTS = (
    "settling", "sharding", "hop", "tls", "one_stream", "many_streams", "first_token", "input_log",
)  # fmt: skip
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    # As azu's own nodes are started.
    "RAY_worker_niceness": "0",
    **LARGE_PAGES,
}
Measure = Callable[[ModelShape], tuple[Figure, ...]]


def run_bench(
    only: Sequence[str], shape: ModelShape, progress: Callable[[str], None] = lambda _: None
) -> BenchReport:
    """Run the measurements named, all if none is; raises InvalidRequest for a name that is none."""
    if unknown := set(only) - set(MEASUREMENTS):
        raise InvalidRequest(
            f"there is no measurement {min(unknown)!r}: {', '.join(MEASUREMENTS)}", param="only"
        )
    measured = []
    # Ray reads some of it when it is imported, which a measurement does first.
    with variables_set(RAY_ENVIRONMENT):
        for name in MEASUREMENTS:
            if only and name not in only:
                continue
            progress(f"Measuring {name.replace('_', ' ')}")
            measure: Measure = import_module(f"azu.cli.bench.{name}").measure
            load, started = os.getloadavg()[0], time.monotonic()
            measured.append(Measured(name, measure(shape), load, round(time.monotonic() - started, 1)))
    return BenchReport(os.cpu_count() or 1, tuple(measured))
