"""What `azu top` draws."""

from rich.console import Console

from azu.api.network import Activity, DeploymentLine, JobCounts, NetworkResponse, NodeLine
from azu.cli.top import Sample, Speed, _screen
from azu.units import MIB


def node(name: str, **given: object) -> NodeLine:
    values: dict[str, object] = {
        "node_id": name, "name": name, "payout_address": "0x1", "state": "alive", "device": "cuda:0",
        "vram_total_bytes": 1024 * MIB, "vram_free_bytes": 256 * MIB, "cached_shards": 0,
        "vram_used_bytes": 700 * MIB, "vram_other_bytes": 0, "load": 0.5,
    }  # fmt: skip
    return NodeLine(**(values | given))  # type: ignore[arg-type]


def drawn(sample: Sample) -> str:
    console = Console(width=150, color_system=None)
    with console.capture() as capture:
        console.print(_screen(sample))
    return capture.get()


def test_a_working_network_shows_its_speed_queue_and_memory() -> None:
    activity = Activity(running_sequences=3, waiting_sequences=1, kv_blocks=128, kv_blocks_used=50, stalls=2)
    model = DeploymentLine("m/one", "r1", "running", 1, 6, (), activity)
    network = NetworkResponse((node("ben", state="suspect"), node("ada")), (model,), JobCounts(4, 2))

    shown = drawn(Sample(network, {"m/one": Speed(41.25, 1.5, 0.0312, None)}))

    assert "41.2 tokens/s" in shown
    assert "4 jobs running, 2 waiting" in shown
    assert "1 of 2 nodes alive" in shown
    assert shown.index("ada") < shown.index("ben")
    assert "700.0 MiB" in shown
    [line] = [line for line in shown.splitlines() if "m/one" in line]
    for words in ("1.50 s", "31.2 ms", " - ", "3 + 1 waiting", "50/128"):
        assert words in line


def test_the_pipelines_of_one_model_are_one_line() -> None:
    pipelines = tuple(DeploymentLine("m/one", "r1", "running", epoch, 6, ()) for epoch in (1, 2))

    shown = drawn(Sample(NetworkResponse((), pipelines), {"m/one": Speed(41.25, 1.5, 0.0312, None)}))

    assert shown.count("m/one") == 1


def test_an_empty_network_says_so() -> None:
    shown = drawn(Sample(NetworkResponse((), ()), {}))

    assert "0 of 0 nodes alive" in shown
    assert "no model is up" in shown


def test_memory_that_nobody_can_tell_apart_is_not_invented() -> None:
    assert "?" in drawn(Sample(NetworkResponse((node("ada", vram_used_bytes=None),), ()), {}))
