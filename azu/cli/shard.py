"""`azu shard`: cut a model into shards on this machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from azu.cli.output import AsJson, Terminal, show, table
from azu.units import format_bytes

if TYPE_CHECKING:
    from azu.protocol.structure import Shard


@dataclass(frozen=True, slots=True)
class CutReport:
    """What was cut, and where it lies."""

    model: str
    revision: str
    folder: str
    architecture: str
    dtype: str
    num_layers: int
    tied_head: bool
    weight_bytes: int
    shards: "tuple[Shard, ...]"


def shard(
    model: Annotated[
        str, typer.Argument(help="A folder, a built-in model such as azu/tiny-moe, or a Hub id.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the shards; under AZU_HOME/shards if not given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a model into one file per layer, router and expert; a cut that was interrupted is resumed."""
    from azu.config import Settings
    from azu.files import disk_errors
    from azu.models import describe
    from azu.models.cut import cut
    from azu.models.sources import find_source, model_folder_name

    folder = Path(model)
    model_id = str(folder.resolve()) if folder.is_dir() else model
    source = find_source(model_id, revision, [folder.resolve().parent] if folder.is_dir() else [])
    architecture = describe(source.folder)
    home = Settings.from_environment().home
    out = out or home / "shards" / model_folder_name(model_id) / source.revision
    with disk_errors(home), _bar("fetching") as fetching:
        weights = source.weights(fetching)
    with disk_errors(home), _bar("cutting") as cutting:
        structure = cut(
            weights,
            out,
            model_id=model_id,
            revision=source.revision,
            architecture=architecture,
            progress=cutting,
        )
    report = CutReport(
        model=model_id,
        revision=structure.revision,
        folder=str(out.resolve()),
        architecture=structure.architecture,
        dtype=structure.dtype,
        num_layers=structure.num_layers,
        tied_head=structure.tied_head,
        weight_bytes=sum(shard.weight_bytes for shard in structure.shards),
        shards=structure.shards,
    )
    show(report, as_json, _draw)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    named = TextColumn("{task.description}", markup=False)
    columns = (named, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as progress:
        task: TaskID = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _draw(report: CutReport) -> Group:
    sizes: dict[str, list[int]] = {}
    for one in report.shards:
        sizes.setdefault(_kind(one.name), []).append(one.size_bytes)
    rows = [
        (kind, len(found), format_bytes(min(found)), format_bytes(max(found)), format_bytes(sum(found)))
        for kind, found in sizes.items()
    ]
    columns = ["kind", "shards", "smallest bytes", "largest bytes", "all bytes"]
    title = f"{report.architecture}, {report.num_layers} layers, {report.dtype}"
    return Group(table(columns, rows, title=title), f"{report.model} at {report.revision}", report.folder)


def _kind(name: str) -> str:
    return "expert" if "_expert_" in name else name.rpartition("_")[2]
