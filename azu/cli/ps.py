"""`azu ps`: the network's nodes, and where the pieces of each model are."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from azu.cli.credentials import open_client
from azu.cli.output import AsJson, Listing, show, table
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
    nodes = [
        (
            names[node.node_id],
            f"{node.state}: {node.why_paused}" if node.why_paused else node.state,
            node.device,
            format_bytes(node.vram_total_bytes),
            format_bytes(node.vram_free_bytes),
            "?" if node.vram_used_bytes is None else format_bytes(node.vram_used_bytes),
            format_bytes(node.vram_other_bytes),
            f"{node.load:.0%}",
            node.bad_frames,
            node.cached_shards,
            node.payout_address,
        )
        for node in found.nodes
    ]
    columns = [
        "node",
        "state",
        "device",
        "VRAM",
        "free",
        "used",
        "others",
        "load",
        "bad frames",
        "cached shards",
        "payout",
    ]
    problems = [Text(problem, "red") for problem in found.problems]
    deployments = [_deployment(one) for one in found.deployments]
    return Group(*problems, table(columns, nodes, title="nodes"), *deployments)


def _deployment(found: "DeploymentLine") -> Listing:
    rows = [(piece.node, piece.actor, _layers(piece), _experts(piece)) for piece in found.topology]
    title = f"{found.model_id}  {found.state}, epoch {found.epoch}"
    return table(["node", "actor", "layers", "experts"], rows, title=title)


def _layers(piece: "PieceLine") -> str:
    start, end = piece.layers
    return f"{start} to {end - 1}" if end > start else ""


def _experts(piece: "PieceLine") -> str:
    return "; ".join(f"layer {layer}: {', '.join(map(str, ids))}" for layer, ids in piece.experts.items())
