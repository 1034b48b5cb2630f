"""Sends each process's metrics to the scheduler, which adds them up, and to Ray's own metrics."""

import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util import metrics as ray_metrics

from actors.placement import NAMESPACE, SCHEDULER
from azu import metrics
from azu.logs import start_logging
from azu.metrics import BY_NAME, Labels, Meter, Metric, MetricKind
from azu.protocol.job import DeploymentStatus
from azu.protocol.node import Node, NodeState
from azu.supervision import Supervisor, end_process

if TYPE_CHECKING:
    # Every stage imports this file: the libraries of money would cost each one 20 MiB.
    from azu.config import ControlConfig
    from azu.money.books import Totals

log = logging.getLogger(__name__)

PERIOD_S = 1.0
_ANSWER_TIMEOUT_S = 5.0


class RayMeter(Meter):
    """A meter that Ray's agent on this node exports too, where there is one; names then begin with `ray_`."""

    def __init__(self) -> None:
        self._is_exported = _has_agent()
        super().__init__(keep_observations=self._is_exported)
        self._instruments: dict[str, Any] = {}
        self._exported: dict[tuple[str, Labels], float] = {}

    def export(self) -> None:
        """Give Ray what is new since the last call: a call to Ray for each event would take too long."""
        if not self._is_exported:
            return
        for (name, labels), value in self.snapshot().values.items():
            metric = BY_NAME[name]
            if metric.kind is MetricKind.GAUGE:
                self._record(metric, value, labels)
            elif value != (before := self._exported.get((name, labels))):
                self._record(metric, value - (before or 0), labels)
                self._exported[name, labels] = value
        for metric, value, labels in self.take_observations():
            self._record(metric, value, labels)

    def _record(self, metric: Metric, value: float, labels: Labels) -> None:
        if metric.name not in self._instruments:
            self._instruments[metric.name] = _new_instrument(metric)
        # `inc` takes no zero, and a series that begins with its first event hides that event from rates.
        self._instruments[metric.name]._record(value, dict(zip(metric.labels, labels, strict=True)))


def open_supervisor(component: str, refresh: Callable[[], None] = lambda: None) -> Supervisor:
    """Return the supervisor of this actor's loops, whose meter is sent to the scheduler each second.

    `refresh` is called before that, in a thread of its own, to set gauges.
    """
    meter = RayMeter()
    supervisor = Supervisor(component, meter, end_process)
    supervisor.start_thread("metrics", _Sending(meter, refresh).send)
    return supervisor


class _Sending:
    """Sends the metrics of one actor."""

    def __init__(self, meter: RayMeter, refresh: Callable[[], None]) -> None:
        self._meter = meter
        self._refresh = refresh
        self._source = ray.get_runtime_context().get_actor_id()
        self._scheduler: ActorHandle | None = None

    def send(self) -> bool:
        """Wait for a period, then send a snapshot."""
        time.sleep(PERIOD_S)
        self._refresh()
        self._meter.export()
        try:
            # The scheduler is another actor after the control plane was started again.
            self._scheduler = self._scheduler or ray.get_actor(SCHEDULER, namespace=NAMESPACE)
            sent = self._scheduler.take_metrics.remote(self._source, self._meter.snapshot())
            ray.get(sent, timeout=_ANSWER_TIMEOUT_S)
        except (RayError, ValueError) as error:
            log.debug("the scheduler did not take this process's metrics: %s", type(error).__name__)
            self._scheduler = None
        return True


def _new_instrument(metric: Metric) -> Any:
    # Prometheus puts the ending of counters there itself.
    name = metric.name.removesuffix("_total")
    if metric.kind is MetricKind.HISTOGRAM:
        return ray_metrics.Histogram(name, metric.meaning, list(metric.buckets), metric.labels)
    kinds = {MetricKind.COUNTER: ray_metrics.Counter, MetricKind.GAUGE: ray_metrics.Gauge}
    return kinds[metric.kind](name, metric.meaning, metric.labels)


def _has_agent() -> bool:
    """Say whether metrics are exported from this node; a node without Ray's dashboard has no agent for it."""
    node_id = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == node_id and node["MetricsExportPort"] > 0 for node in ray.nodes())


def log_as(process: str, **ids: object) -> None:
    """Log as this actor from now on; an actor that a test made of its plain class leaves logging alone."""
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        start_logging(process, ids)


def show_nodes(meter: Meter, nodes: Iterable[Node]) -> None:
    """Show every node's live memory and load, and how many there are in each state."""
    nodes = [node for node in nodes if node.state is not NodeState.LEFT]
    states = Counter(node.state for node in nodes)
    shown = (state for state in NodeState if state is not NodeState.LEFT)
    meter.set_gauge(metrics.NODES, {(state.value,): states[state] for state in shown})
    meter.set_gauge(metrics.NODE_VRAM, {(node.name,): node.vram_total_bytes for node in nodes})
    meter.set_gauge(metrics.NODE_VRAM_FREE, {(node.name,): node.vram_free_bytes for node in nodes})
    used: dict[Labels, float] = {
        (node.name,): node.vram_used_bytes for node in nodes if node.vram_used_bytes is not None
    }
    meter.set_gauge(metrics.NODE_VRAM_USED, used)
    meter.set_gauge(metrics.NODE_VRAM_OTHER, {(node.name,): node.vram_other_bytes for node in nodes})
    for node in nodes:
        meter.count(metrics.BAD_FRAMES, 0, node.name)
        meter.count(metrics.LEFT_OUT, 0, node.name)
    meter.set_gauge(metrics.NODE_LOAD, {(node.name,): node.load for node in nodes})


def show_deployments(meter: Meter, deployments: Iterable[DeploymentStatus]) -> None:
    """Show of each model how many of its pipelines are slow."""
    slow: Counter[str] = Counter()
    for one in deployments:
        slow[one.model_id] += one.state == "slow"
    meter.set_gauge(metrics.SLOW_PIPELINES, {(model_id,): count for model_id, count in slow.items()})


def show_head(meter: Meter, home: Path, ends_s: Mapping[str, float]) -> None:
    """Show the free part of the disk of jobs, and when the certificates end that this machine shows.

    In a cluster that azu did not start the home may lie elsewhere, or belong to another user.
    """
    free: dict[Labels, float] = {}
    with suppress(OSError):
        disk = shutil.disk_usage(home)
        free = {("jobs",): disk.free / disk.total}
    meter.set_gauge(metrics.DISK_FREE, free)
    meter.set_gauge(metrics.CERTIFICATE_ENDS, {(name,): at_s for name, at_s in ends_s.items()})


def certificate_ends(config: "ControlConfig") -> dict[str, float]:
    """Return when the certificates of this machine's ingress and Ray node end, where they have any."""
    from azu.auth.certificates import read_certificate

    paths = {} if config.tls is None else {"ingress": config.tls.certificate}
    if os.environ.get("RAY_USE_TLS") == "1":
        paths["ray"] = Path(os.environ["RAY_TLS_SERVER_CERT"])
    return {
        name: read_certificate(path.read_bytes()).not_valid_after_utc.timestamp()
        for name, path in paths.items()
    }


def show_jobs(meter: Meter, num_waiting: int, num_running: int) -> None:
    """Show the jobs that have not ended."""
    meter.set_gauge(metrics.JOBS, {("waiting",): num_waiting, ("running",): num_running})


def show_books(meter: Meter, totals: "Totals | None") -> None:
    """Show what was charged, earned and paid so far, and what each kind of account holds.

    Without totals the books do not answer: what they hold is shown as unknown, not as it was before.
    """
    held: dict[Labels, float] = {}
    lost: dict[Labels, float] = {}
    findings: dict[Labels, float] = {}
    if totals is not None:
        meter.raise_counter_to(metrics.LAMPORTS_CHARGED, totals.charged_lamports)
        meter.raise_counter_to(metrics.LAMPORTS_EARNED, totals.earned_lamports)
        meter.raise_counter_to(metrics.LAMPORTS_PAID, totals.paid_lamports)
        held = {(kind,): lamports for kind, lamports in totals.held_lamports.items()}
        lost, findings = {(): totals.lost_writes}, {(): len(totals.unsigned)}
    meter.set_gauge(metrics.LAMPORTS_HELD, held)
    meter.set_gauge(metrics.LEDGER_LOST, lost)
    meter.set_gauge(metrics.SIGNER_FINDINGS, findings)
