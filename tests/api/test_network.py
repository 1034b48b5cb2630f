"""What is said of one model, and how fast it was between two looks."""

import pytest

from azu import metrics
from azu.api.network import Activity
from azu.cli.top import speed_between
from azu.metrics import Meter
from deployments.network import activity_of


def test_a_model_s_activity_is_its_own() -> None:
    meter = Meter()
    meter.count(metrics.GENERATED_TOKENS, 9, "m")
    meter.count(metrics.GENERATED_TOKENS, 100, "other")
    meter.count(metrics.RECOVERIES, 1, "m", "repaired")
    meter.set_gauge(metrics.SEQUENCES, {("m", "running"): 2, ("m", "waiting"): 1})
    meter.observe(metrics.HOP, 0.002, "m", "0")
    meter.observe(metrics.HOP, 0.004, "m", "1")

    found = activity_of(meter.snapshot(), "m")

    assert found.generated_tokens == 9
    assert (found.running_sequences, found.waiting_sequences) == (2, 1)
    assert found.recoveries == 1
    assert (found.hop.count, found.hop.seconds) == (2, 0.006)
    assert activity_of(meter.snapshot(), "unknown") == Activity()


def test_speed_is_what_happened_between_two_looks() -> None:
    meter = Meter()
    meter.count(metrics.GENERATED_TOKENS, 10, "m")
    meter.observe(metrics.TIME_PER_TOKEN, 5.0, "m")
    before = activity_of(meter.snapshot(), "m")
    meter.count(metrics.GENERATED_TOKENS, 30, "m")
    meter.observe(metrics.TIME_PER_TOKEN, 0.1, "m")
    meter.observe(metrics.TIME_PER_TOKEN, 0.3, "m")

    speed = speed_between(before, activity_of(meter.snapshot(), "m"), 2.0)

    assert speed.tokens_per_s == 15
    assert speed.time_per_token_s == pytest.approx(0.2)
    assert speed.hop_s is None
