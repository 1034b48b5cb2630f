"""What `azu bench` found: figures beside the reference of the same run."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

import ray

from actors.placement import NAMESPACE
from azu.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of azu and what it is held against.

    `ratio` is what counts: it has to be `at_least` or `at_most` the target, where there is one. `notes` holds
    whatever else the run showed, by name and unit.
    """

    name: str
    unit: str
    value: float
    reference: float
    reference_name: str
    at_least: float | None = None
    at_most: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The figure over its reference."""
        return self.value / self.reference

    @property
    def passed(self) -> bool | None:
        """Whether the target was met; None where there is none."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return self.ratio <= self.at_most if self.at_most is not None else None


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement's figures. `load` is the machine's load when it began: what else it was computing."""

    measurement: str
    figures: tuple[Measurement, ...]
    load: float
    seconds: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All that was measured in one run, on `cpus` cores."""

    cpus: int
    measured: tuple[Measured, ...]

    @property
    def passed(self) -> bool:
        """Whether no target was missed."""
        return all(figure.passed is not False for one in self.measured for figure in one.figures)

    def facts(self) -> dict[str, object]:
        """Return the report for programs, ratios and verdicts included."""
        return {
            "cpus": self.cpus,
            "passed": self.passed,
            "measurements": [
                {
                    "measurement": one.measurement,
                    "load": one.load,
                    "seconds": one.seconds,
                    "figures": [_facts(figure) for figure in one.figures],
                }
                for one in self.measured
            ],
        }


def _facts(figure: Measurement) -> dict[str, object]:
    return {
        "name": figure.name,
        "unit": figure.unit,
        "value": figure.value,
        "reference": figure.reference,
        "reference_name": figure.reference_name,
        "ratio": figure.ratio,
        "at_least": figure.at_least,
        "at_most": figure.at_most,
        "passed": figure.passed,
        "notes": dict(figure.notes),
    }


P = ParamSpec("P")
T = TypeVar("T")


def call_apart(timeout_s: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return a function's result; raises DeadlineExceeded when it is not there in time."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result(timeout_s)
        except TookTooLong as error:
            for process in list(pool._processes.values()):
                process.kill()
            raise DeadlineExceeded(f"{function.__name__} took more than {timeout_s:.0f} s") from error


_OBJECT_STORE_BYTES = 128 * 1024 * 1024


@contextmanager
def ray_here() -> Iterator[None]:
    """Be connected to a cluster of this process's own, which is gone afterwards."""
    # Sockets have short paths.
    with tempfile.TemporaryDirectory(prefix="azu-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=0,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()
