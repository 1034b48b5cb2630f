"""Metrics: the catalogue of all of them, a meter per process, their sum over a network, Prometheus's text.

Units are in the names; a counter's name ends in `_total`, as in Prometheus. Ray exports the same metrics
under names that begin with `ray_`.
"""

import logging
import math
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A process sends its metrics once a second; the gauges of a silent one say nothing about now.
SILENCE_S = 10.0
# A last snapshot may still come of a process that is over.
_KEPT_SOURCES = 10_000

Labels = tuple[str, ...]


class MetricKind(StrEnum):
    """A metric's kind, in Prometheus's words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric. `buckets` are the upper bounds of a histogram's buckets, without the infinite one."""

    name: str
    kind: MetricKind
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, MetricKind.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, MetricKind.GAUGE, meaning, labels)


def _histogram(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, MetricKind.HISTOGRAM, meaning, labels, buckets)


_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_FINE_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)

PROMPT_TOKENS = _counter("azu_prompt_tokens_total", "Prompt tokens of sequences that began.", "model")
GENERATED_TOKENS = _counter("azu_generated_tokens_total", "Tokens delivered.", "model")
TIME_TO_FIRST_TOKEN = _histogram(
    "azu_time_to_first_token_seconds",
    "From a sequence's arrival in its pipeline to its first token.",
    _SECONDS,
    "model",
)
TIME_PER_TOKEN = _histogram(
    "azu_time_per_token_seconds", "Between two tokens of one sequence.", _SECONDS, "model"
)
STALLS = _counter("azu_stalls_total", "Waits of a second or more between two tokens of a sequence.", "model")
RECOVERIES = _counter("azu_recoveries_total", "Repairs of lost pieces.", "model", "result")
HOP = _histogram(
    "azu_hop_seconds",
    "A frame's way to the next stage and its acknowledgement's way back, without what is computed there.",
    _FINE_SECONDS,
    "model",
    "stage",
)
SLOW_PIPELINES = _gauge(
    "azu_slow_pipelines", "Pipelines with a piece that comes on slower than expected.", "model"
)
SEQUENCES = _gauge(
    "azu_sequences", "Sequences in a pipeline: running, or waiting for KV blocks.", "model", "state"
)
KV_BLOCKS = _gauge("azu_kv_blocks", "KV blocks of a pipeline, the same on each of its stages.", "model")
KV_BLOCKS_USED = _gauge("azu_kv_blocks_used", "KV blocks that sequences hold.", "model")
JOBS = _gauge("azu_jobs", "Jobs: running, or waiting for their model.", "state")
JOBS_ENDED = _counter("azu_jobs_ended_total", "Jobs that ended, by their last state.", "model", "state")
NODES = _gauge("azu_nodes", "Nodes by state.", "state")
NODE_VRAM = _gauge("azu_node_vram_bytes", "VRAM that a node lends.", "node")
NODE_VRAM_FREE = _gauge("azu_node_vram_free_bytes", "The part of it where more may be placed.", "node")
NODE_VRAM_USED = _gauge("azu_node_vram_used_bytes", "What azu's processes really hold on the node.", "node")
NODE_VRAM_OTHER = _gauge(
    "azu_node_vram_other_bytes", "What other programs hold on the node's device.", "node"
)
NODE_LOAD = _gauge("azu_node_load_ratio", "The busy part of a node's device.", "node")
FAULTS = _counter(
    "azu_faults_total",
    "Exceptions that azu does not raise on purpose, by background loop.",
    "component",
    "loop",
)
UNHEALTHY = _gauge(
    "azu_unhealthy_loops", "Loops that failed five times in a row; their process is replaced.", "component"
)
BAD_FRAMES = _counter("azu_bad_frames_total", "Frames that a node sent and their receiver refused.", "node")
DISPUTED_CHOICES = _counter(
    "azu_disputed_choices_total",
    "Choices of experts that a router and an expert set count differently; the platform keeps their pay.",
    "model",
)
CANARIES = _counter(
    "azu_canaries_total", "Answers to the canary's prompts, by what they say.", "model", "result"
)
LEFT_OUT = _counter("azu_left_out_total", "Times that a node was left out because it changed tokens.", "node")
LAMPORTS_CHARGED = _counter(
    "azu_lamports_charged_total", "Lamports charged for jobs since the books were opened."
)
LAMPORTS_EARNED = _counter(
    "azu_lamports_earned_total", "Lamports that workers earned since the books were opened."
)
LAMPORTS_PAID = _counter(
    "azu_lamports_paid_total", "Lamports paid out to workers since the books were opened."
)
LAMPORTS_HELD = _gauge(
    "azu_lamports_held", "Lamports of users and workers that the platform holds, by purpose.", "account"
)
LEDGER_LOST = _gauge(
    "azu_ledger_lost_writes", "Writes of the ledger that Redis lost, until the admin accepts the loss."
)
SIGNER_FINDINGS = _gauge(
    "azu_signer_findings", "Reasons for which the signer signs nothing, once they stand for three looks."
)
WALLET = _gauge("azu_wallet_lamports", "What the platform's account holds on the chain.")
FEE_MISSING = _gauge(
    "azu_fee_missing",
    "1 while the platform lacks the fee, in another token, of paying to a new account.",
)
ACTIONS_LEFT = _gauge("azu_chain_actions_left", "Actions that the chain still accepts from the platform.")
LIMIT_USED = _gauge(
    "azu_payout_limit_used_ratio", "The part of a day's limit on payouts that was sent within a day.", "kind"
)
LAST_DONE = _gauge(
    "azu_last_done_timestamp_seconds", "When a copy was made last, and when an audit found nothing.", "what"
)
DISK_FREE = _gauge("azu_disk_free_ratio", "The free part of the disk of a store on the head.", "store")
CERTIFICATE_ENDS = _gauge(
    "azu_certificate_ends_timestamp_seconds", "When a certificate that the head shows ends.", "certificate"
)

CATALOGUE = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
BY_NAME = {metric.name: metric for metric in CATALOGUE}

Observation = tuple[Metric, float, Labels]


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts` is parallel to the metric's buckets, with one more for values above all of them."""

    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """The number of observations."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """The state of meters at one moment, by the metric's name and the values of its labels."""

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
        return _added(
            metric,
            (
                histogram
                for (name, found), histogram in self.histograms.items()
                if name == metric.name and found[:length] == labels
            ),
        )


@dataclass(slots=True)
class _GrowingHistogram:
    counts: list[int]
    sum: float = 0.0


class Meter:
    """Counters, gauges and histograms of one process; several threads may use it.

    With `keep_observations` it keeps each observation until `take_observations`.
    """

    def __init__(self, *, keep_observations: bool = False) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], _GrowingHistogram] = {}
        self._kept: list[Observation] | None = [] if keep_observations else None

    def count(self, metric: Metric, amount: float, *labels: str) -> None:
        """Raise a counter by an amount that is not negative."""
        _check(metric, MetricKind.COUNTER, labels)
        key = (metric.name, labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def raise_counter_to(self, metric: Metric, total: float, *labels: str) -> None:
        """Raise a counter to a total that another part of azu counts; a lower total changes nothing."""
        with self._lock:
            before = self._values.get((metric.name, labels), 0)
        self.count(metric, max(0, total - before), *labels)

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add one observation to a histogram."""
        _check(metric, MetricKind.HISTOGRAM, labels)
        key = (metric.name, labels)
        with self._lock:
            histogram = self._histograms.get(key)
            if histogram is None:
                histogram = self._histograms[key] = _GrowingHistogram([0] * (len(metric.buckets) + 1))
            histogram.counts[bisect_left(metric.buckets, value)] += 1
            histogram.sum += value
            if self._kept is not None:
                self._kept.append((metric, value, labels))

    def set_gauge(self, metric: Metric, values: Mapping[Labels, float]) -> None:
        """Replace all values of a gauge: labels that are not among `values` disappear."""
        with self._lock:
            for key in [key for key in self._values if key[0] == metric.name]:
                del self._values[key]
            for labels, value in values.items():
                _check(metric, MetricKind.GAUGE, labels)
                self._values[metric.name, labels] = value

    def snapshot(self) -> MetricsSnapshot:
        """Return the present values."""
        with self._lock:
            histograms = {
                key: Histogram(tuple(growing.counts), growing.sum)
                for key, growing in self._histograms.items()
            }
            return MetricsSnapshot(dict(self._values), histograms)

    def take_observations(self) -> list[Observation]:
        """Return the observations since the last call, one by one, and forget them."""
        with self._lock:
            taken, self._kept = self._kept or [], None if self._kept is None else []
        return taken


class MetricsSum:
    """The metrics of all processes of a network together. Each process has a name that is used only once."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, MetricsSnapshot]] = {}
        self._ended: dict[str, None] = {}  # the latest ones
        self._past = MetricsSnapshot({}, {})

    def record(self, source: str, snapshot: MetricsSnapshot, now_s: float) -> None:
        """Store a process's latest snapshot, as far as this process knows its series.

        A process that was silent for SILENCE_S is over for good.
        """
        try:
            known = _known(snapshot)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            log.warning("the metrics of %.64s are left out: %s", source, type(error).__name__)
            return
        if source not in self._ended:
            self._latest[source] = (now_s, known)

    def total(self, now_s: float) -> MetricsSnapshot:
        """Return the sum: counters and histograms of all processes ever, gauges of those that are alive."""
        for source, (recorded_s, snapshot) in list(self._latest.items()):
            if now_s - recorded_s > SILENCE_S:
                self._past = _merged((self._past, _without_gauges(snapshot)))
                self._ended[source] = None
                del self._latest[source]
        for source in list(self._ended)[:-_KEPT_SOURCES]:
            del self._ended[source]
        return _merged((self._past, *(snapshot for _, snapshot in self._latest.values())))


def exposition(snapshot: MetricsSnapshot) -> bytes:
    """Return a snapshot as Prometheus's text, one family for each metric of the catalogue that has data."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(snapshot))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, snapshot: MetricsSnapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Family]:
        for metric in CATALOGUE:
            family = Family(metric.name.removesuffix("_total"), metric.meaning, metric.kind.value)
            for (name, labels), value in sorted(self._snapshot.values.items()):
                if name == metric.name:
                    family.add_sample(name, _named(metric, labels), value)
            for (name, labels), histogram in sorted(self._snapshot.histograms.items()):
                if name == metric.name:
                    for suffix, more, value in _series(metric, histogram):
                        family.add_sample(name + suffix, _named(metric, labels) | more, value)
            if family.samples:
                yield family


def _known(snapshot: MetricsSnapshot) -> MetricsSnapshot:
    """Return the series that are of this catalogue; what raises for a snapshot that is none is a builtin."""
    values = {
        key: value
        for key, value in snapshot.values.items()
        if (metric := _metric_of(*key)) and metric.kind is not MetricKind.HISTOGRAM and _is_number(value)
    }
    histograms = {
        key: one
        for key, one in snapshot.histograms.items()
        if (metric := _metric_of(*key))
        and metric.kind is MetricKind.HISTOGRAM
        and len(one.counts) == len(metric.buckets) + 1
        and all(map(_is_number, (*one.counts, one.sum)))
    }
    return MetricsSnapshot(values, histograms)


def _metric_of(name: str, labels: Labels) -> Metric | None:
    metric = BY_NAME.get(name)
    is_one = metric is not None and type(labels) is tuple and len(labels) == len(metric.labels)
    return metric if is_one and all(type(label) is str for label in labels) else None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _named(metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(metric.labels, labels, strict=True))


def _series(metric: Metric, histogram: Histogram) -> Iterator[tuple[str, dict[str, str], float]]:
    below = 0
    for bound, count in zip((*metric.buckets, float("inf")), histogram.counts, strict=True):
        below += count
        yield "_bucket", {"le": "+Inf" if bound == float("inf") else str(bound)}, below
    yield "_count", {}, histogram.count
    yield "_sum", {}, histogram.sum


def _merged(snapshots: Iterable[MetricsSnapshot]) -> MetricsSnapshot:
    """Return the sum of snapshots, series by series."""
    values: dict[tuple[str, Labels], float] = {}
    histograms: dict[tuple[str, Labels], Histogram] = {}
    for snapshot in snapshots:
        for key, value in snapshot.values.items():
            values[key] = values.get(key, 0) + value
        for key, histogram in snapshot.histograms.items():
            before = (histograms[key],) if key in histograms else ()
            histograms[key] = _added(BY_NAME[key[0]], (*before, histogram))
    return MetricsSnapshot(values, histograms)


def _without_gauges(snapshot: MetricsSnapshot) -> MetricsSnapshot:
    counters = {
        key: value for key, value in snapshot.values.items() if BY_NAME[key[0]].kind is MetricKind.COUNTER
    }
    return MetricsSnapshot(counters, snapshot.histograms)


def _added(metric: Metric, histograms: Iterable[Histogram]) -> Histogram:
    """Return the sum of histograms of one metric."""
    counts, total = [0] * (len(metric.buckets) + 1), 0.0
    for histogram in histograms:
        counts = [before + more for before, more in zip(counts, histogram.counts, strict=True)]
        total += histogram.sum
    return Histogram(tuple(counts), total)


def _check(metric: Metric, kind: MetricKind, labels: Labels) -> None:
    assert metric.kind is kind, f"{metric.name} is a {metric.kind}"
    assert len(labels) == len(metric.labels), f"{metric.name} has the labels {metric.labels}"
