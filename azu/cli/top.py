"""`azu top`: the network's nodes, models, queue and speed, live."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from azu.api.network import Activity
from azu.cli.credentials import open_client
from azu.cli.output import AsJson, Listing, console, show, table
from azu.cli.ps import shown_names
from azu.units import format_bytes

if TYPE_CHECKING:
    from azu.api.network import DeploymentLine, NetworkResponse, NodeLine


@dataclass(frozen=True, slots=True)
class Speed:
    """A model's speed between two samples; None where nothing was measured."""

    tokens_per_s: float
    time_to_first_token_s: float | None
    time_per_token_s: float | None
    hop_s: float | None


def speed_between(before: Activity, after: Activity, seconds: float) -> Speed:
    """Return a model's speed between two samples, `seconds` apart."""
    tokens = after.generated_tokens - before.generated_tokens
    return Speed(
        tokens_per_s=max(0, tokens) / seconds,
        time_to_first_token_s=after.time_to_first_token.mean_s(before.time_to_first_token),
        time_per_token_s=after.time_per_token.mean_s(before.time_per_token),
        hop_s=after.hop.mean_s(before.hop),
    )


_BAR_WIDTH = 16

Once = Annotated[bool, typer.Option("--once", help="Print one sample and end.")]
Period = Annotated[float, typer.Option(min=0.2, max=60, help="Seconds between two samples.")]


@dataclass(frozen=True, slots=True)
class Sample:
    """The network at one moment, and each model's speed since the sample before, by model id."""

    network: "NetworkResponse"
    speeds: "dict[str, Speed]"


def top(every: Period = 1.0, once: Once = False, as_json: AsJson = False) -> None:
    """Show speed, queue, KV blocks and live VRAM until Ctrl-C; with --once or --json one sample."""
    samples = _samples(every)
    if as_json:
        sample = next(samples)
        speeds = {model_id: asdict(speed) for model_id, speed in sample.speeds.items()}
        show(sample.network.model_dump(mode="json") | {"speeds": speeds}, as_json, lambda _: "")
        return
    if once:
        console.print(_screen(next(samples)))
        return
    from rich.live import Live

    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            for sample in samples:
                live.update(_screen(sample), refresh=True)
    except KeyboardInterrupt:
        return


def _samples(period_s: float) -> Iterator[Sample]:
    """Yield a sample after each period; a network's meters report once a second."""
    from azu.api.network import Activity

    client = open_client()
    before, sampled_s = client.network(), time.monotonic()
    while True:
        time.sleep(period_s)
        after, now_s = client.network(), time.monotonic()
        known = {model.model_id: model.activity for model in before.deployments}
        speeds = {
            model.model_id: speed_between(
                known.get(model.model_id, Activity()), model.activity, now_s - sampled_s
            )
            for model in after.deployments
        }
        yield Sample(after, speeds)
        before, sampled_s = after, now_s


def _screen(sample: Sample) -> Group:
    found = sample.network
    alive = sum(node.state == "alive" for node in found.nodes)
    total = sum(speed.tokens_per_s for speed in sample.speeds.values())
    summary = Text.assemble(
        (f"{total:.1f} tokens/s", "bold"),
        f"   {found.jobs.running} jobs running, {found.jobs.waiting} waiting",
        f"   {alive} of {len(found.nodes)} nodes alive",
    )
    return Group(summary, "", _nodes(found.nodes), "", _models(sample))


def _nodes(nodes: "tuple[NodeLine, ...]") -> Listing:
    names = shown_names(nodes)
    rows = [
        (
            names[node.node_id],
            Text(node.state, style="green" if node.state == "alive" else "red"),
            _bar(node.vram_total_bytes - node.vram_free_bytes, node.vram_total_bytes, _BAR_WIDTH),
            format_bytes(node.vram_total_bytes),
            format_bytes(node.vram_free_bytes),
            "?" if node.vram_used_bytes is None else format_bytes(node.vram_used_bytes),
            format_bytes(node.vram_other_bytes),
            f"{node.load:.0%}",
        )
        for node in sorted(nodes, key=lambda node: node.name)
    ]
    columns = ["node", "state", "VRAM taken", "lent", "free", "used", "others", "load"]
    return table(columns, rows, lines=False)


def _models(sample: Sample) -> RenderableType:
    if not sample.network.deployments:
        return Text("no model is up; the first prompt brings one up", style="dim")
    columns = ["model", "tokens/s", "first", "next", "hop", "run/wait", "KV used", "stalls", "repairs"]
    # The pipelines of one model count together.
    models = {one.model_id: one for one in sample.network.deployments}.values()
    return table(columns, [_model(model, sample.speeds[model.model_id]) for model in models], lines=False)


def _model(model: "DeploymentLine", speed: "Speed") -> list[object]:
    does = model.activity
    return [
        (model.model_id if model.state == "running" else f"{model.model_id} ({model.state})"),
        f"{speed.tokens_per_s:.1f}",
        _time(speed.time_to_first_token_s),
        _time(speed.time_per_token_s),
        _time(speed.hop_s),
        f"{does.running_sequences}/{does.waiting_sequences}",
        f"{does.kv_blocks_used / max(1, does.kv_blocks):.0%}",
        str(does.stalls),
        str(does.recoveries),
    ]


def _bar(part: int, whole: int, width: int) -> ProgressBar:
    # A full bar in the finished style would look as if a task had ended.
    return ProgressBar(total=max(1, whole), completed=part, width=width, finished_style="bar.complete")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
