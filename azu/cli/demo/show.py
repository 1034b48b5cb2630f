"""What the demo prints: steps as they happen, the answer as it streams, a topology table, a receipt."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text

from azu.units import hype_from_lamports

if TYPE_CHECKING:
    from azu.cli.demo.run import DemoReport, DemoRun

Step = Callable[[str], None]


class Narrator:
    """Tells a person what happens; with `quiet` it says nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(quiet=quiet, highlight=False)
        self._status: Status | None = None

    @contextmanager
    def steps(self) -> Iterator[Step]:
        """Show the running step with a spinner, and each finished one with its time."""
        started = time.monotonic()
        current = ""

        def finish() -> None:
            if current:
                self._console.print(f"[green]✓[/] {current} [dim]{time.monotonic() - started:.1f} s[/]")

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
    def answer(self, model: str, question: str) -> Iterator[Step]:
        """Show an answer's pieces as they come."""
        first = True

        def say(piece: str) -> None:
            nonlocal first
            if first:
                # A spinner and a line that grows cannot share the terminal.
                if self._status is not None:
                    self._status.stop()
                self._console.print(f"\n[bold]{question}[/] [dim]{model}[/]")
                first = False
            self._console.print(Text(piece), end="")

        yield say
        self._console.print("\n")
        if self._status is not None:
            self._status.start()

    def report(self, report: "DemoReport") -> None:
        """Show who ran what and where the money went."""
        for run in report.runs:
            self._console.print(_topology(run))
            self._console.print(_receipt(run))
        self._console.print(
            f"All accounts sum to {report.ledger_sum_lamports} lamports. Done in {report.seconds:.1f} s."
        )


def _topology(run: "DemoRun") -> Table:
    table = Table(title=f"{run.model}: who ran what", title_justify="left")
    for column in ("node", "actor", "layers", "experts beside or apart"):
        table.add_column(column)
    for line in run.topology:
        start, end = line["layers"]
        experts = "; ".join(
            f"layer {layer}: {', '.join(map(str, ids))}" for layer, ids in line["experts"].items()
        )
        table.add_row(line["node"], line["actor"], f"{start} to {end - 1}" if end > start else "", experts)
    return table


def _receipt(run: "DemoRun") -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    tokens = f"{run.prompt_tokens} prompt + {run.completion_tokens} completion"
    table.add_row(f"{tokens} tokens x {run.layers} layers", f"{run.token_layers} token-layers")
    table.add_row("charged", f"{run.charged_lamports} lamports")
    table.add_row("platform", f"{run.platform_lamports} lamports")
    for address, lamports in sorted(run.worker_lamports.items()):
        table.add_row(f"worker {address}", f"{lamports} lamports")
    before, after = run.balance_before_lamports, run.balance_after_lamports
    table.add_row("balance", f"{hype_from_lamports(before)} to {hype_from_lamports(after)} HYPE")
    return Panel(table, title=f"receipt: {run.model}", title_align="left", expand=False)
