"""`azu ps`: the network's nodes, and where the pieces of each model are."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from azu.cli.credentials import open_client
from azu.cli.output import AsJson, show, table
from azu.units import format_bytes

if TYPE_CHECKING:
    from azu.api.network import DeploymentLine, NetworkResponse, NodeLine, PieceLine


def ps(as_json: AsJson = False) -> None:
    """Show what does not run as it should, the nodes, their VRAM, and where the pieces of each model are."""
    show(open_client().network(), as_json, _network)


def shown_names(nodes: "Sequence[NodeLine]") -> dict[str, str]:
    """Return by id what each node is called: its name, with digits of its id where others have it too."""
    times = Counter(node.name for node in nodes)
    return {
        node.node_id: node.name if times[node.name] == 1 else f"{node.name} ({node.node_id[:12]})"
        for node in nodes
    }


def _network(found: "NetworkResponse") -> Group:
    names = shown_names(found.nodes)
    memory = [
        (
            names[node.node_id],
            node.state,
            node.device,
            format_bytes(node.vram_total_bytes),
            format_bytes(node.vram_free_bytes),
            "?" if node.vram_used_bytes is None else format_bytes(node.vram_used_bytes),
            format_bytes(node.vram_other_bytes),
            f"{node.load:.0%}",
        )
        for node in found.nodes
    ]
    owners = [
        (names[node.node_id], node.payout_address, node.cached_shards, node.bad_frames)
        for node in found.nodes
    ]
    problems = [Text(problem, "red") for problem in found.problems]
    paused = [
        Text(f"{names[node.node_id]} is paused: {node.why_paused}", "yellow")
        for node in found.nodes
        if node.why_paused
    ]
    columns = ["node", "state", "device", "VRAM", "free", "used", "others", "load"]
    paid = table(["node", "payout", "shards", "bad frames"], owners, lines=False)
    nodes = Group(table(columns, memory, lines=False), *paused, Text(), paid)
    none = Text("no node lends: azu join", "dim")
    return Group(*problems, nodes if found.nodes else none, *map(_deployment, found.deployments))


def _deployment(found: "DeploymentLine") -> Group:
    rows = [(piece.node, _layers(piece), _experts(piece), piece.actor) for piece in found.topology]
    title = Text(f"\n{found.model_id}  {found.state}, {found.num_layers} layers, epoch {found.epoch}")
    return Group(title, table(["node", "layers", "experts", "actor"], rows, lines=False))


def _layers(piece: "PieceLine") -> str:
    start, end = piece.layers
    return f"{start} to {end - 1}" if end > start else ""


def _experts(piece: "PieceLine") -> str:
    return "; ".join(f"layer {layer}: {_spans(ids)}" for layer, ids in piece.experts.items())


def _spans(ids: "Sequence[int]") -> str:
    """Return numbers in words, consecutive ones as a span: 0 to 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
