"""What `azu bench` found, and what every measurement needs: a process, a Ray cluster, rounds in turns."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

from azu.errors import DeadlineExceeded
from azu.units import MIB

P = ParamSpec("P")
T = TypeVar("T")

_OBJECT_STORE_BYTES = 128 * MIB


@dataclass(frozen=True, slots=True)
class Measurement:
    """A value of azu beside a reference; the target, if any, is a bound of the ratio of the two.

    `notes` holds what else the run showed, by name and unit.
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
        """The value over its reference."""
        return self.value / self.reference

    @property
    def passed(self) -> bool | None:
        """Whether the target was met; None where there is none."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return self.ratio <= self.at_most if self.at_most is not None else None


Measurements = Sequence[Measurement]


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one measurement. `load` is the machine's load when it began."""

    measurement: str
    figures: Measurements
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
        measurements = [
            asdict(one)
            | {
                "figures": [
                    asdict(each) | {"ratio": each.ratio, "passed": each.passed} for each in one.figures
                ]
            }
            for one in self.measured
        ]
        return {"cpus": self.cpus, "passed": self.passed, "measurements": measurements}


def call_apart(timeout_s: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return a function's result from a new process; raises DeadlineExceeded when it takes too long."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result(timeout_s)
        except TimeoutError as error:
            for process in list(pool._processes.values()):
                process.kill()
            raise DeadlineExceeded(f"{function.__name__} took more than {timeout_s:.0f} s") from error


@contextmanager
def ray_here() -> Iterator[None]:
    """Connect to a Ray cluster of this process's own, which ends with the block."""
    # Ray reads its environment when it is imported: `run_bench` sets it first.
    import ray

    from actors.placement import NAMESPACE

    # Paths of sockets have to be short.
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


def seconds_of(work: Callable[..., object], *args: object) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


def in_turns(
    rounds: int, first: Callable[[int], object], second: Callable[[int], object]
) -> tuple[list[float], list[float]]:
    """Return the seconds of each round of two kinds of work, which take the round's number.

    The order is first, second, second, first: what else the machine does slows both alike.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 * rounds):
        which = (turn + 1) // 2 % 2
        seconds[which].append(seconds_of((first, second)[which], turn // 2))
    return seconds
