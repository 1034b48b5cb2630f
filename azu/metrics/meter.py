"""A meter: what one process counts and measures, as a picture that can be sent to another."""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from azu.metrics.catalogue import Kind, Metric

Labels = tuple[str, ...]
Observation = tuple[Metric, float, Labels]


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts` is parallel to the metric's buckets, with one more for what lies above them all."""

    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Picture:
    """What meters show at one moment, by the metric's name and its labels' values."""

    values: Mapping[tuple[str, Labels], float]
    histograms: Mapping[tuple[str, Labels], Histogram]

    def value(self, metric: Metric, *labels: str) -> float:
        """Return a counter or gauge, summed over the labels that are not given."""
        length = len(labels)
        return sum(
            value
            for (name, found), value in self.values.items()
            if name == metric.name and found[:length] == labels
        )

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        """Return a histogram, summed over the labels that are not given."""
        length = len(labels)
        return added(
            metric,
            (
                one
                for (name, found), one in self.histograms.items()
                if name == metric.name and found[:length] == labels
            ),
        )


@dataclass(slots=True)
class _Cells:
    """A histogram that grows."""

    counts: list[int]
    sum: float = 0.0


class Meter:
    """Counts, measures and shows; may be called from several threads.

    With `keep_observations` each one is kept until somebody takes them.
    """

    def __init__(self, *, keep_observations: bool = False) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], _Cells] = {}
        self._kept: list[Observation] | None = [] if keep_observations else None

    def count(self, metric: Metric, amount: float, *labels: str) -> None:
        """Raise a counter by what is not negative."""
        _check(metric, Kind.COUNTER, labels)
        key = (metric.name, labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def reach(self, metric: Metric, total: float, *labels: str) -> None:
        """Raise a counter to a total that is kept elsewhere; a lower one changes nothing."""
        with self._lock:
            before = self._values.get((metric.name, labels), 0)
        self.count(metric, max(0, total - before), *labels)

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add one observation to a histogram."""
        _check(metric, Kind.HISTOGRAM, labels)
        key = (metric.name, labels)
        with self._lock:
            cells = self._histograms.get(key)
            if cells is None:
                cells = self._histograms[key] = _Cells([0] * (len(metric.buckets) + 1))
            cells.counts[bisect_left(metric.buckets, value)] += 1
            cells.sum += value
            if self._kept is not None:
                self._kept.append((metric, value, labels))

    def show(self, metric: Metric, values: Mapping[Labels, float]) -> None:
        """Replace a gauge: labels that are not among `values` are no longer shown."""
        with self._lock:
            for key in [key for key in self._values if key[0] == metric.name]:
                del self._values[key]
            for labels, value in values.items():
                _check(metric, Kind.GAUGE, labels)
                self._values[metric.name, labels] = value

    def picture(self) -> Picture:
        """Return what it shows now."""
        with self._lock:
            histograms = {
                key: Histogram(tuple(cells.counts), cells.sum) for key, cells in self._histograms.items()
            }
            return Picture(dict(self._values), histograms)

    def take_observations(self) -> list[Observation]:
        """Return what was observed since the last time, one by one, and keep it no longer."""
        with self._lock:
            taken, self._kept = self._kept or [], None if self._kept is None else []
        return taken


def added(metric: Metric, histograms: Iterable[Histogram]) -> Histogram:
    """Return the sum of histograms of one metric."""
    counts, total = [0] * (len(metric.buckets) + 1), 0.0
    for one in histograms:
        counts = [mine + theirs for mine, theirs in zip(counts, one.counts, strict=True)]
        total += one.sum
    return Histogram(tuple(counts), total)


def _check(metric: Metric, kind: Kind, labels: Labels) -> None:
    assert metric.kind is kind, f"{metric.name} is a {metric.kind}"
    assert len(labels) == len(metric.labels), f"{metric.name} has the labels {metric.labels}"
