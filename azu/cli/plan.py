"""`azu plan`: the placement of a model's pieces on given nodes, its speed and its price."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from azu.cli.output import AsJson, Terminal, show, table
from azu.units import format_bytes, hype_from_lamports

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from azu.protocol.node import Node
    from azu.protocol.structure import Structure
    from azu.protocol.topology import Topology


def plan(
    model: Annotated[
        str, typer.Argument(help="A folder of shards or of a model, a built-in model, or a Hub id.")
    ],
    nodes: Annotated[
        Path, typer.Option(help="YAML file of nodes; configs/nodes.example.yaml is one.", exists=True)
    ],
    network: Annotated[
        Path | None, typer.Option(help="Network file with the policy; AZU_NETWORK if not given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    pipelines: Annotated[
        int, typer.Option(min=1, help="The most pipelines of the model; they share no node.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Show where a model's pieces would go; a model that is not cut yet is cut first."""
    from azu.config import Settings, load_network
    from azu.config.nodes_file import read_nodes
    from azu.planner.migration import cold_start_s
    from azu.planner.replicas import plan_pipelines

    settings = Settings.from_environment()
    policy = load_network(network or settings.network).policy.plan_policy()
    structure = _structure(model, revision, settings.home / "shards")
    if structure.may_overflow:
        Terminal(stderr=True).print(
            "Warning: this checkpoint is in bfloat16, and its config.json has it served in float16, whose "
            "largest value is 65,504. Texts that exceed it end with numerics_error. "
            'Set "dtype": "bfloat16" in its config.json, and cut it again.',
            style="yellow",
            soft_wrap=True,
        )
    found = read_nodes(nodes, structure)
    planned = plan_pipelines(structure, found, policy, most=pipelines)

    def draw(topology: "Topology") -> Group:
        return _draw(topology, found, cold_start_s(structure, topology, found, policy))

    if pipelines == 1:
        show(planned[0], as_json, draw)
    else:
        show(planned, as_json, lambda topologies: Group(*map(draw, topologies)))


def _structure(model: str, revision: str | None, shards: Path) -> "Structure":
    """Return the structure of a cut model; a model that is not cut yet is cut first."""
    from azu.protocol.structure import STRUCTURE_FILE, Structure

    folder = Path(model)
    if (folder / STRUCTURE_FILE).is_file():
        path = folder / STRUCTURE_FILE
        return Structure.from_json(path.read_bytes(), where=str(path))

    from azu.files import disk_errors
    from azu.models import describe
    from azu.models.cut import cut
    from azu.models.sources import find_source, model_folder_name

    model_id = str(folder.resolve()) if folder.is_dir() else model
    source = find_source(model_id, revision, [folder.resolve().parent] if folder.is_dir() else [])
    with disk_errors(shards.parent), Terminal(stderr=True).status("reading the model") as status:

        def show_progress(done: int, total: int) -> None:
            status.update(f"reading the model: {format_bytes(done)} of {format_bytes(total)}")

        return cut(
            source.weights(show_progress),
            shards / model_folder_name(model_id) / source.revision,
            model_id=model_id,
            revision=source.revision,
            architecture=describe(source.folder),
            progress=show_progress,
        )


def _draw(topology: "Topology", nodes: "Sequence[Node]", start_s: float) -> Group:
    free = {node.node_id: node.vram_free_bytes for node in nodes}
    rows = [
        (
            stage.node_id,
            f"stage {stage.index}",
            f"{stage.span.start} to {stage.span.end - 1}",
            _experts(stage.experts),
            format_bytes(stage.vram_bytes),
            format_bytes(free[stage.node_id]),
        )
        for stage in topology.stages
    ]
    rows += [
        (
            chosen.node_id,
            f"experts {chosen.index}",
            "",
            _experts(chosen.experts),
            format_bytes(chosen.vram_bytes),
            format_bytes(free[chosen.node_id]),
        )
        for chosen in topology.expert_sets
    ]
    prediction = topology.prediction
    return Group(
        table(["node", "piece", "layers", "experts", "VRAM", "free"], rows, title=topology.model_id),
        f"predicted {prediction.tokens_per_s:,.1f} tokens/s, "
        f"{prediction.time_per_output_token_s * 1000:,.1f} ms per token of one sequence; "
        f"{hype_from_lamports(prediction.lamports_per_token)} HYPE per token",
        f"KV for {topology.num_blocks * topology.block_size:,} tokens on every stage; "
        f"up {start_s:,.1f} s after it is asked for",
    )


def _experts(experts: "Mapping[int, tuple[int, ...]]") -> str:
    return "; ".join(f"layer {layer}: {_ranges(ids)}" for layer, ids in sorted(experts.items()) if ids)


def _ranges(ids: tuple[int, ...]) -> str:
    """Return ascending ids as text with ranges: "0-5, 7"."""
    starts = [one for one in ids if one - 1 not in ids]
    ends = [one for one in ids if one + 1 not in ids]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)
