"""Every metric of azu by name, kind, labels and meaning; units are in the names.

A counter's name ends in `_total`, as Prometheus has it. What Ray exports of them begins with `ray_`.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector


class Kind(StrEnum):
    """What Prometheus calls it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric. `buckets` are the upper bounds of a histogram's, without the infinite one."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_FINE_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)

PROMPT_TOKENS = Metric(
    "azu_prompt_tokens_total", Kind.COUNTER, "Prompt tokens of sequences that began.", ("model",)
)
GENERATED_TOKENS = Metric("azu_generated_tokens_total", Kind.COUNTER, "Tokens delivered.", ("model",))
TIME_TO_FIRST_TOKEN = Metric(
    "azu_time_to_first_token_seconds",
    Kind.HISTOGRAM,
    "From a sequence's arrival in its pipeline to its first token.",
    ("model",),
    _SECONDS,
)
TIME_PER_TOKEN = Metric(
    "azu_time_per_token_seconds",
    Kind.HISTOGRAM,
    "Between two tokens of one sequence.",
    ("model",),
    _SECONDS,
)
STALLS = Metric(
    "azu_stalls_total",
    Kind.COUNTER,
    "Waits of a second or more between two tokens of a sequence.",
    ("model",),
)
RECOVERIES = Metric("azu_recoveries_total", Kind.COUNTER, "Repairs of lost pieces.", ("model", "result"))
HOP = Metric(
    "azu_hop_seconds",
    Kind.HISTOGRAM,
    "A frame's way to the next stage and its acknowledgement's way back, without what is computed there.",
    ("model", "stage"),
    _FINE_SECONDS,
)
SEQUENCES = Metric(
    "azu_sequences", Kind.GAUGE, "Sequences in a pipeline: running, or waiting for KV blocks.",
    ("model", "state"),
)  # fmt: skip
KV_BLOCKS = Metric(
    "azu_kv_blocks", Kind.GAUGE, "KV blocks of a pipeline, the same on each of its stages.", ("model",)
)
KV_BLOCKS_USED = Metric("azu_kv_blocks_used", Kind.GAUGE, "KV blocks that sequences hold.", ("model",))
JOBS = Metric("azu_jobs", Kind.GAUGE, "Jobs: running, or waiting for their model.", ("state",))
JOBS_ENDED = Metric("azu_jobs_ended_total", Kind.COUNTER, "Jobs that ended, by how.", ("model", "state"))
NODES = Metric("azu_nodes", Kind.GAUGE, "Nodes by state.", ("state",))
NODE_VRAM = Metric("azu_node_vram_bytes", Kind.GAUGE, "VRAM that a node lends.", ("node",))
NODE_VRAM_FREE = Metric(
    "azu_node_vram_free_bytes", Kind.GAUGE, "What of it may still be placed there.", ("node",)
)
NODE_VRAM_USED = Metric(
    "azu_node_vram_used_bytes", Kind.GAUGE, "What azu's processes really hold on the node.", ("node",)
)
NODE_VRAM_OTHER = Metric(
    "azu_node_vram_other_bytes", Kind.GAUGE, "What other programs hold on the node's device.", ("node",)
)
NODE_LOAD = Metric("azu_node_load_ratio", Kind.GAUGE, "The busy part of a node's device.", ("node",))
BAD_FRAMES = Metric(
    "azu_bad_frames_total", Kind.COUNTER, "Frames that a node sent and their receiver refused.", ("node",)
)
LAMPORTS_CHARGED = Metric(
    "azu_lamports_charged_total", Kind.COUNTER, "Lamports charged for jobs since the books were opened."
)
LAMPORTS_EARNED = Metric(
    "azu_lamports_earned_total", Kind.COUNTER, "Lamports that workers earned since the books were opened."
)
LAMPORTS_PAID = Metric(
    "azu_lamports_paid_total", Kind.COUNTER, "Lamports paid out to workers since the books were opened."
)
LAMPORTS_HELD = Metric(
    "azu_lamports_held", Kind.GAUGE, "Lamports of users and workers that the platform holds, by what for.",
    ("account",),
)  # fmt: skip

CATALOGUE = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
BY_NAME = {metric.name: metric for metric in CATALOGUE}


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
class MetricsSnapshot:
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

    def picture(self) -> MetricsSnapshot:
        """Return what it shows now."""
        with self._lock:
            histograms = {
                key: Histogram(tuple(cells.counts), cells.sum) for key, cells in self._histograms.items()
            }
            return MetricsSnapshot(dict(self._values), histograms)

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


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(picture: MetricsSnapshot) -> bytes:
    """Return what a picture shows, one family for each metric of the catalogue that has data."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(picture))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, picture: MetricsSnapshot) -> None:
        self._picture = picture

    def collect(self) -> Iterable[Family]:
        for metric in CATALOGUE:
            family = Family(metric.name.removesuffix("_total"), metric.help, metric.kind.value)
            for (name, labels), value in sorted(self._picture.values.items()):
                if name == metric.name:
                    family.add_sample(name, _named(metric, labels), value)
            for (name, labels), one in sorted(self._picture.histograms.items()):
                if name == metric.name:
                    for suffix, more, value in _series(metric, one):
                        family.add_sample(name + suffix, _named(metric, labels) | more, value)
            if family.samples:
                yield family


def _named(metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(metric.labels, labels, strict=True))


def _series(metric: Metric, one: Histogram) -> Iterator[tuple[str, dict[str, str], float]]:
    assert metric.kind is Kind.HISTOGRAM
    below = 0
    for bound, count in zip((*metric.buckets, float("inf")), one.counts, strict=True):
        below += count
        yield "_bucket", {"le": "+Inf" if bound == float("inf") else str(bound)}, below
    yield "_count", {}, one.count
    yield "_sum", {}, one.sum


# Meters speak each second; what a silent one showed last says nothing about now.
SILENCE_S = 10.0
_NOTHING = MetricsSnapshot({}, {})


class MetricsSum:
    """Hears the meters of a network's processes, each under a name that is used once."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, MetricsSnapshot]] = {}
        self._gone: set[str] = set()
        self._past = _NOTHING

    def hear(self, source: str, picture: MetricsSnapshot, now_s: float) -> None:
        """Take what a process shows; it replaces what that one showed before."""
        if source not in self._gone:
            self._heard[source] = (now_s, picture)

    def picture(self, now_s: float) -> MetricsSnapshot:
        """Return the sum: counters of all that ever were, gauges of those that spoke lately."""
        for source, (heard_s, picture) in list(self._heard.items()):
            if now_s - heard_s > SILENCE_S:
                self._past = merged((self._past, _lasting(picture)))
                self._gone.add(source)
                del self._heard[source]
        return merged((self._past, *(picture for _, picture in self._heard.values())))


def merged(pictures: Iterable[MetricsSnapshot]) -> MetricsSnapshot:
    """Return the sum of pictures, series by series."""
    values: dict[tuple[str, Labels], float] = {}
    histograms: dict[tuple[str, Labels], Histogram] = {}
    for picture in pictures:
        for key, value in picture.values.items():
            values[key] = values.get(key, 0) + value
        for key, one in picture.histograms.items():
            before = (histograms[key],) if key in histograms else ()
            histograms[key] = added(BY_NAME[key[0]], (*before, one))
    return MetricsSnapshot(values, histograms)


def _lasting(picture: MetricsSnapshot) -> MetricsSnapshot:
    counters = {key: value for key, value in picture.values.items() if BY_NAME[key[0]].kind is Kind.COUNTER}
    return MetricsSnapshot(counters, picture.histograms)
