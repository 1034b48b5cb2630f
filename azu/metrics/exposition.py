"""A picture in Prometheus's text format."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector

from azu.metrics.catalogue import CATALOGUE, Kind, Metric
from azu.metrics.meter import Histogram, Picture

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(picture: Picture) -> bytes:
    """Return what a picture shows, one family for each metric of the catalogue that has data."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(picture))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, picture: Picture) -> None:
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
