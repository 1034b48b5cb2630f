"""What commands print: tables for people, one JSON object for programs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, JustifyMethod, RenderableType
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
console = Console(highlight=False)


def show(facts: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print facts: as JSON, or as `render` draws them."""
    if as_json:
        typer.echo(json.dumps(_plain(facts), default=_plain))
    else:
        console.print(render(facts))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> Table:
    """Return a table; columns whose name ends in a unit are right-aligned, the first is not broken."""
    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = column.endswith(
            ("lamports", "charged", "released", "HYPE", "bytes", "VRAM", "free", "shards")
        )
        # An id that is cut short or broken cannot be copied.
        justify: JustifyMethod = "right" if numeric else "left"
        drawn.add_column(column, justify=justify, overflow="fold", no_wrap=index == 0)
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    return drawn


def _plain(facts: Any) -> Any:
    if is_dataclass(facts) and not isinstance(facts, type):
        return asdict(facts)
    if isinstance(facts, set | frozenset | tuple):
        return list(facts)
    return facts
