"""How commands print: tables and progress for people, one JSON object for programs.

What they print was often written by others. A Terminal shows it and never acts on it.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Self

import typer
from rich.box import HEAVY_HEAD
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from azu.printable import printable
from azu.units import hype_from_lamports

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Terminal(Console):
    """A console on which strings have no markup and no character acts; `Text` has what azu styles itself."""

    def __init__(self, **given: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **given)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield a renderable's segments with every acting character escaped."""
        for one in super().render(renderable, options):
            yield one if one.control else Segment(printable(one.text, kept="\n"), one.style)


console = Terminal()


_DONE = "✓"


def done(text: str) -> Text:
    """Return a line that says what was done."""
    return Text.assemble((_DONE, "green"), f" {text}")


def show(facts: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print facts: as JSON, or the way `render` draws them."""
    if as_json:
        typer.echo(json.dumps(_plain(facts), default=_plain))
    else:
        console.print(render(facts))


AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV for a spreadsheet.")]


def show_csv(lines: Sequence[Mapping[str, object]]) -> None:
    """Print lines that have the same names as CSV, under these names."""
    import csv

    if lines:
        writer = csv.DictWriter(sys.stdout, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _plain_cell(value) for name, value in one.items()} for one in lines)


def _plain_cell(value: object) -> object:
    """Return a value on one line; a spreadsheet takes a text that begins like a formula for one."""
    text = printable(str(value)) if isinstance(value, str) else value
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@")) else text


Exact = Annotated[bool, typer.Option("--exact", help="Print amounts in lamports; 10^8 of them are one HYPE.")]


def unit(exact: bool) -> str:
    """Return the unit in which amounts are printed for people."""
    return "lamports" if exact else "HYPE"


def amount(lamports: int | None, exact: bool) -> str:
    """Return an amount for people in that unit, without it; nothing for None."""
    if lamports is None:
        return ""
    return str(lamports) if exact else hype_from_lamports(lamports)


_WIDER_THAN_ANY = 100_000
# How the names of columns with numbers end.
_NUMBERS = (
    "lamports", "charged", "released", "HYPE", "bytes", "VRAM", "free", "used", "others", "load", "lent",
    "shards", "context", "tokens/s", "first", "next", "hop", "run/wait", "stalls", "repairs", "frames",
)  # fmt: skip


class Listing:
    """Rows under columns: a table, or where the terminal is too narrow for it a block of lines for each row.

    Number columns, known by their names, are right-aligned; the first column never wraps.
    """

    def __init__(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None, *, lines: bool
    ) -> None:
        self._columns = [printable(column) for column in columns]
        self._rows = rows
        self._title = None if title is None else printable(title)
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table if it fits, else the blocks."""
        wide, unbounded = self._table(), options.update(width=_WIDER_THAN_ANY)
        fits = console.measure(wide, options=unbounded).maximum <= options.max_width
        # Where the first column has no name, a row is a line of text, which may go on below.
        if fits or not self._rows or not self._columns[0]:
            yield wide
            return
        if self._title:
            yield Text(self._title, "italic")
        for row in self._rows:
            block = Table(box=None, show_header=False, pad_edge=False)
            # What a name needs; the rest of the line is for what may be long.
            block.add_column(style="dim", no_wrap=True)
            block.add_column(overflow="fold")
            head, *others = map(cell, row)
            block.add_row(Text(self._columns[0]), head)
            for column, content in zip(self._columns[1:], others, strict=True):
                if content:
                    block.add_row(Text(f"  {column}"), content)
            yield block

    def _table(self) -> Table:
        drawn = Table(
            title=self._title,
            title_justify="left",
            box=HEAVY_HEAD if self._lines else None,
            pad_edge=self._lines,
            collapse_padding=not self._lines,
            header_style=None if self._lines else "dim",
        )
        for index, column in enumerate(self._columns):
            justify: JustifyMethod = "right" if column.endswith(_NUMBERS) else "left"
            # An id that is cut short or wrapped cannot be copied.
            drawn.add_column(Text(column), justify=justify, overflow="fold", no_wrap=index == 0)
        for row in self._rows:
            drawn.add_row(*map(cell, row))
        return drawn


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str | None = None,
    lines: bool = True,
) -> Listing:
    """Return rows under columns, in a table with lines or without."""
    return Listing(columns, rows, title, lines=lines)


def utc(at_ms: int) -> str:
    """Return a time in ms as people read it, in UTC."""
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def day(at_ms: int) -> str:
    """Return the day (UTC) of a time in ms."""
    return utc(at_ms)[:10]


def cell(content: object) -> Text | ProgressBar:
    """Return a cell of a table, on one line."""
    if isinstance(content, Text | ProgressBar):
        return content
    return Text("" if content is None else printable(str(content)))


def _plain(facts: Any) -> Any:
    if hasattr(facts, "model_dump"):
        return facts.model_dump(mode="json")
    if is_dataclass(facts) and not isinstance(facts, type):
        return asdict(facts)
    if isinstance(facts, set | frozenset | tuple):
        return list(facts)
    return facts


class WaitingLine:
    """What is waited for, on stderr: one line that the next one replaces, or lines where that is no terminal.

    With `quiet` it shows nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Terminal(stderr=True)
        self._status = self._console.status("", refresh_per_second=4)
        self._told = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Show a text, until `clear`."""
        if self._quiet or text == self._told:
            return
        self._told = text
        if self._console.is_terminal:
            self._status.update(Text(text, "dim"))
            self._status.start()
        else:
            self._console.print(Text(text), soft_wrap=True)

    def clear(self) -> None:
        """Take the line away: something else is printed."""
        self._told = ""
        self._status.stop()


Step = Callable[[str], None]


class ProgressPrinter:
    """Prints the steps of a command as they run, on stderr with `stderr`; with `quiet` it prints nothing."""

    def __init__(self, *, quiet: bool = False, stderr: bool = False) -> None:
        self._console = Terminal(quiet=quiet, stderr=stderr)
        self._status: Status | None = None

    @contextmanager
    def steps(self) -> Iterator[Step]:
        """Show the running step with a spinner, and each finished one with its time."""
        started = time.monotonic()
        current = ""

        def finish() -> None:
            if current:
                self._console.print(done(current), Text(f"{time.monotonic() - started:.1f} s", "dim"))

        with self._console.status("Starting") as self._status:

            def step(text: str) -> None:
                nonlocal current, started
                finish()
                current, started = text, time.monotonic()
                self._begin(text)

            yield step
            finish()
        self._status = None

    @contextmanager
    def steps_of_another(self) -> Iterator[Step]:
        """Show the lines that the `steps` of another process printed, where there was no terminal."""
        with self._console.status("Starting") as self._status:

            def line(text: str) -> None:
                if text.startswith(_DONE):
                    self._console.print(text)
                else:
                    self._begin(text)

            yield line
        self._status = None

    def _begin(self, text: str) -> None:
        assert self._status is not None
        if self._console.is_terminal:
            self._status.update(text)
        else:
            self._console.print(text)

    @contextmanager
    def answer(self, model: str, question: str) -> Iterator[Callable[[str], None]]:
        """Yield a function that prints the parts of a model's answer as they come."""
        first = True

        def write(text: str) -> None:
            nonlocal first
            if first:
                # A spinner and a line that grows cannot share the terminal.
                if self._status is not None:
                    self._status.stop()
                self._console.print(Text.assemble("\n", (question, "bold"), " ", (model, "dim")))
                first = False
            self._console.print(Text(text), end="")

        yield write
        self._console.print("\n")
        if self._status is not None:
            self._status.start()

    def print(self, *renderables: RenderableType) -> None:
        """Print renderables one below the other."""
        for renderable in renderables:
            self._console.print(renderable)
