"""What `azu top` draws."""

import pytest

from azu.api.network import Activity, DeploymentLine, JobCounts, NetworkResponse, NodeLine, TimeTotal
from azu.cli.output import Terminal
from azu.cli.top import Sample, Speed, _screen, speed_between
from azu.units import MIB


def node(name: str, **given: object) -> NodeLine:
    values: dict[str, object] = {
        "node_id": name, "name": name, "payout_address": "0x1", "state": "alive", "device": "cuda:0",
        "vram_total_bytes": 1024 * MIB, "vram_free_bytes": 256 * MIB, "cached_shards": 0,
        "vram_used_bytes": 700 * MIB, "vram_other_bytes": 0, "load": 0.5,
    }  # fmt: skip
    return NodeLine.model_validate(values | given)


def deployment(**given: object) -> DeploymentLine:
    values = {"model_id": "m/one", "revision": "r1", "state": "running", "epoch": 1, "num_layers": 6}
    return DeploymentLine.model_validate(values | {"topology": ()} | given)


def drawn(sample: Sample) -> str:
    console = Terminal(width=150, color_system=None)
    with console.capture() as capture:
        console.print(_screen(sample))
    return capture.get()


def test_a_working_network_shows_its_speed_queue_and_memory() -> None:
    activity = Activity(running_sequences=3, waiting_sequences=1, kv_blocks=128, kv_blocks_used=50, stalls=2)
    network = NetworkResponse(
        nodes=(node("ben", state="suspect"), node("ada")),
        deployments=(deployment(activity=activity),),
        jobs=JobCounts(running=4, waiting=2),
    )

    shown = drawn(Sample(network, {"m/one": Speed(41.25, 1.5, 0.0312, None)}))

    assert "41.2 tokens/s" in shown
    assert "4 jobs running, 2 waiting" in shown
    assert "1 of 2 nodes alive" in shown
    assert shown.index("ada") < shown.index("ben")
    assert "700.0 MiB" in shown
    [line] = [line for line in shown.splitlines() if "m/one" in line]
    for words in ("1.50 s", "31.2 ms", " - ", "3/1", "39%"):
        assert words in line


def test_the_pipelines_of_one_model_are_one_line() -> None:
    network = NetworkResponse(nodes=(), deployments=(deployment(epoch=1), deployment(epoch=2)))

    shown = drawn(Sample(network, {"m/one": Speed(41.25, 1.5, 0.0312, None)}))

    assert shown.count("m/one") == 1


def test_an_empty_network_says_so() -> None:
    shown = drawn(Sample(NetworkResponse(nodes=(), deployments=()), {}))

    assert "0 of 0 nodes alive" in shown
    assert "no model is up" in shown


def test_unknown_used_memory_is_a_question_mark() -> None:
    network = NetworkResponse(nodes=(node("ada", vram_used_bytes=None),), deployments=())

    assert "?" in drawn(Sample(network, {}))


def test_a_speed_counts_what_happened_between_two_samples() -> None:
    before = Activity(generated_tokens=10, time_per_token=TimeTotal(count=1, seconds=5.0))
    after = Activity(generated_tokens=40, time_per_token=TimeTotal(count=3, seconds=5.4))

    speed = speed_between(before, after, 2.0)

    assert speed.tokens_per_s == 15
    assert speed.time_per_token_s == pytest.approx(0.2)
    assert speed.hop_s is None
