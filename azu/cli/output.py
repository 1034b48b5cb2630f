"""How commands print: tables and progress for people, one JSON object for programs.

What they print was often written by others. A Terminal shows it and never acts on it.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from azu.printable import printable

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


def done(text: str) -> Text:
    """Return a line that says what was done."""
    return Text.assemble(("✓", "green"), f" {text}")


def show(facts: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print facts: as JSON, or the way `render` draws them."""
    if as_json:
        typer.echo(json.dumps(_plain(facts), default=_plain))
    else:
        console.print(render(facts))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> Table:
    """Return a table whose number columns, known by their names, are right-aligned; the first never wraps."""
    drawn = Table(title=None if title is None else printable(title), title_justify="left")
    for index, column in enumerate(columns):
        numeric = column.endswith(
            ("lamports", "charged", "released", "HYPE", "bytes", "VRAM", "free", "shards")
        )
        # An id that is cut short or wrapped cannot be copied.
        justify: JustifyMethod = "right" if numeric else "left"
        drawn.add_column(Text(printable(column)), justify=justify, overflow="fold", no_wrap=index == 0)
    for row in rows:
        drawn.add_row(*map(cell, row))
    return drawn


def utc(at_ms: int) -> str:
    """Return a time in ms as people read it, in UTC."""
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def cell(content: object) -> Text:
    """Return a cell of a table, on one line."""
    if isinstance(content, Text):
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


Step = Callable[[str], None]


class ProgressPrinter:
    """Prints the steps of a command as they run; with `quiet` it prints nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Terminal(quiet=quiet)
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
                assert self._status is not None
                self._status.update(text)

            yield step
            finish()
        self._status = None

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
