"""A model's activity, out of the network's metrics."""

from azu import metrics
from azu.api.network import Activity
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
