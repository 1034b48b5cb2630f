"""How a process's meter reaches the scheduler, which adds all of them up, and Ray's own metrics."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util import metrics as ray_metrics

from actors.placement import NAMESPACE, SCHEDULER
from azu.metrics.catalogue import Kind, Metric
from azu.metrics.meter import Labels, Meter

log = logging.getLogger(__name__)

PERIOD_S = 1.0
_ANSWER_TIMEOUT_S = 5.0


class RayMeter(Meter):
    """A meter that Ray's agent on the node exports too, where there is one; names then begin with `ray_`."""

    def __init__(self) -> None:
        super().__init__()
        self._instruments: dict[str, Any] = {}

    def count(self, metric: Metric, amount: float, *labels: str) -> None:
        """Raise a counter by what is not negative."""
        super().count(metric, amount, *labels)
        if amount > 0:
            self._instrument(metric).inc(amount, _tags(metric, labels))

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add one observation to a histogram."""
        super().observe(metric, value, *labels)
        self._instrument(metric).observe(value, _tags(metric, labels))

    def show(self, metric: Metric, values: Mapping[Labels, float]) -> None:
        """Replace a gauge; Ray forgets by itself what is not shown for a while."""
        super().show(metric, values)
        for labels, value in values.items():
            self._instrument(metric).set(value, _tags(metric, labels))

    def _instrument(self, metric: Metric) -> Any:
        if metric.name not in self._instruments:
            self._instruments[metric.name] = _new_instrument(metric)
        return self._instruments[metric.name]


def open_meter(look: Callable[[], None] = lambda: None) -> Meter:
    """Return this actor's meter, which is sent to the scheduler each second.

    `look` is called before, in a thread of its own, to show what changes without being counted.
    """
    meter = RayMeter()
    source = ray.get_runtime_context().get_actor_id()
    thread = threading.Thread(target=_send, args=(meter, source, look), name="metrics", daemon=True)
    thread.start()
    return meter


def _send(meter: Meter, source: str, look: Callable[[], None]) -> None:
    scheduler: ActorHandle | None = None
    while not threading.Event().wait(PERIOD_S):
        try:
            look()
            # It is another one after the control plane was started again.
            scheduler = scheduler or ray.get_actor(SCHEDULER, namespace=NAMESPACE)
            ray.get(scheduler.hear.remote(source, meter.picture()), timeout=_ANSWER_TIMEOUT_S)
        except (RayError, ValueError) as error:
            log.debug("the scheduler did not take this process's metrics: %s", type(error).__name__)
            scheduler = None


def _new_instrument(metric: Metric) -> Any:
    # Prometheus puts the ending of counters there itself.
    name = metric.name.removesuffix("_total")
    if metric.kind is Kind.HISTOGRAM:
        return ray_metrics.Histogram(name, metric.help, list(metric.buckets), metric.labels)
    kinds = {Kind.COUNTER: ray_metrics.Counter, Kind.GAUGE: ray_metrics.Gauge}
    return kinds[metric.kind](name, metric.help, metric.labels)


def _tags(metric: Metric, labels: Labels) -> dict[str, str]:
    return dict(zip(metric.labels, labels, strict=True))
