"""Meters: what they count, how they are summed, and how Prometheus reads the sum."""

from typing import Any

import pytest
from hypothesis import given
from prometheus_client.parser import text_string_to_metric_families

from azu import metrics
from azu.metrics import (
    CATALOGUE,
    SILENCE_S,
    Histogram,
    Meter,
    MetricKind,
    MetricsSnapshot,
    MetricsSum,
    exposition,
)
from tests.builders import RUBBISH


def test_names_begin_with_azu_and_those_of_counters_end_in_total() -> None:
    for metric in CATALOGUE:
        assert metric.name.startswith("azu_")
        assert metric.name.endswith("_total") == (metric.kind is MetricKind.COUNTER)
        assert (metric.kind is MetricKind.HISTOGRAM) == bool(metric.buckets)
        assert metric.buckets == tuple(sorted(set(metric.buckets)))


def test_a_snapshot_sums_over_labels_that_are_not_given() -> None:
    meter = Meter()
    meter.count(metrics.GENERATED_TOKENS, 3, "m1")
    meter.count(metrics.GENERATED_TOKENS, 4, "m2")
    meter.observe(metrics.HOP, 0.001, "m1", "1")
    meter.observe(metrics.HOP, 0.5, "m1", "2")

    snapshot = meter.snapshot()

    assert snapshot.value(metrics.GENERATED_TOKENS) == 7
    assert snapshot.value(metrics.GENERATED_TOKENS, "m1") == 3
    assert snapshot.histogram(metrics.HOP, "m1").count == 2
    assert snapshot.histogram(metrics.HOP, "m1", "2").sum == 0.5
    assert snapshot.histogram(metrics.HOP, "m3") == Histogram((0,) * (len(metrics.HOP.buckets) + 1), 0.0)


def test_a_gauge_that_is_set_again_forgets_labels_that_are_gone() -> None:
    meter = Meter()
    meter.set_gauge(metrics.NODE_LOAD, {("ada",): 0.5, ("ben",): 0.1})
    meter.set_gauge(metrics.NODE_LOAD, {("ben",): 0.2})

    assert meter.snapshot().values == {("azu_node_load_ratio", ("ben",)): 0.2}


def test_a_counter_that_follows_a_total_never_falls() -> None:
    meter = Meter()
    for total in (5, 9, 7, 9, 10):
        meter.raise_counter_to(metrics.LAMPORTS_PAID, total)

    assert meter.snapshot().value(metrics.LAMPORTS_PAID) == 10


def test_counters_outlive_their_process_and_gauges_do_not() -> None:
    first, second, together = Meter(), Meter(), MetricsSum()
    for meter in (first, second):
        meter.count(metrics.GENERATED_TOKENS, 5, "m")
        meter.observe(metrics.HOP, 0.01, "m", "1")
        meter.set_gauge(metrics.KV_BLOCKS, {("m",): 16})
    together.record("first", first.snapshot(), 0.0)
    together.record("first", first.snapshot(), 1.0)
    together.record("second", second.snapshot(), 1.0)
    both = together.total(1.0)
    together.record("second", second.snapshot(), 2 + SILENCE_S)

    left = together.total(2 + SILENCE_S)

    assert both.value(metrics.KV_BLOCKS) == 32
    assert left.value(metrics.KV_BLOCKS) == 16
    assert left.value(metrics.GENERATED_TOKENS) == both.value(metrics.GENERATED_TOKENS) == 10
    assert left.histogram(metrics.HOP).count == 2


def test_a_process_that_was_silent_too_long_is_not_counted_twice() -> None:
    meter, together = Meter(), MetricsSum()
    meter.count(metrics.GENERATED_TOKENS, 5, "m")
    together.record("one", meter.snapshot(), 0.0)
    assert together.total(100.0).value(metrics.GENERATED_TOKENS) == 5

    together.record("one", meter.snapshot(), 101.0)

    assert together.total(101.0).value(metrics.GENERATED_TOKENS) == 5


def test_only_the_latest_processes_that_ended_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_KEPT_SOURCES", 2)
    together = MetricsSum()
    for number in range(5):
        together.record(f"process {number}", Meter().snapshot(), 0.0)
    together.total(100.0)

    assert list(together._ended) == ["process 3", "process 4"]


@given(one=RUBBISH, two=RUBBISH)
def test_series_that_this_process_does_not_know_are_left_out(one: Any, two: Any) -> None:
    hop, meter, together = metrics.HOP, Meter(), MetricsSum()
    meter.observe(hop, 0.01, "m", "1")
    meter.count(metrics.GENERATED_TOKENS, 5, "m")
    told = [
        one,
        MetricsSnapshot(one, two),
        MetricsSnapshot({("azu_of_another_release", ("m",)): 1.0}, {("azu_other", ()): Histogram((1,), 1.0)}),
        MetricsSnapshot({(hop.name, ("m", "1")): 1.0}, {(metrics.JOBS.name, ("m",)): Histogram((1,), 1.0)}),
        MetricsSnapshot({(metrics.JOBS.name, ("m",)): one}, {(hop.name, ("m", "1")): Histogram((1, 2), two)}),
        MetricsSnapshot({(metrics.JOBS.name, ("m", "n")): 1.0}, {(hop.name, ("m",)): Histogram((one,), 1.0)}),
        meter.snapshot(),
    ]
    for number, snapshot in enumerate(told):
        together.record(str(number), snapshot, 0.0)

    for now_s in (0.0, 2 * SILENCE_S):
        total = together.total(now_s)
        assert total.value(metrics.GENERATED_TOKENS) == 5
        assert total.histogram(hop).count == 1
        assert b"another_release" not in exposition(total)


def test_prometheus_parses_every_family() -> None:
    meter = Meter()
    for metric in CATALOGUE:
        labels = tuple(f'a "{name}"\n' for name in metric.labels)
        if metric.kind is MetricKind.COUNTER:
            meter.count(metric, 2, *labels)
        elif metric.kind is MetricKind.GAUGE:
            meter.set_gauge(metric, {labels: 2})
        else:
            meter.observe(metric, metric.buckets[0], *labels)
            meter.observe(metric, metric.buckets[-1] + 1, *labels)

    families = {
        family.name: family
        for family in text_string_to_metric_families(exposition(meter.snapshot()).decode())
    }

    assert set(families) == {metric.name.removesuffix("_total") for metric in CATALOGUE}
    for metric in CATALOGUE:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind.value
        assert family.documentation == metric.meaning
        assert set(family.samples[0].labels) - {"le"} == set(metric.labels)
    buckets = [one for one in families["azu_hop_seconds"].samples if one.name.endswith("_bucket")]
    assert [one.value for one in buckets] == [1.0] * len(metrics.HOP.buckets) + [2.0]
    assert buckets[-1].labels["le"] == "+Inf"


def test_missing_labels_fail_an_assertion() -> None:
    with pytest.raises(AssertionError, match="azu_hop_seconds has the labels"):
        Meter().observe(metrics.HOP, 0.1, "m")


def test_observations_are_kept_one_by_one_only_on_request() -> None:
    keeping, forgetting = Meter(keep_observations=True), Meter()
    for meter in (keeping, forgetting):
        meter.observe(metrics.HOP, 0.1, "m", "0")
        meter.observe(metrics.HOP, 0.2, "m", "1")

    assert keeping.take_observations() == [
        (metrics.HOP, 0.1, ("m", "0")),
        (metrics.HOP, 0.2, ("m", "1")),
    ]
    assert keeping.take_observations() == forgetting.take_observations() == []
    assert keeping.snapshot() == forgetting.snapshot()
