"""`azu bench`: how fast azu is on this machine, beside others in the same run."""

from typing import TYPE_CHECKING, Annotated

import typer

from azu.cli.output import AsJson, Terminal, show

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from azu.bench.report import BenchReport, Measurement


Only = Annotated[list[str] | None, typer.Option(help="A measurement; may be given more than once.")]


def bench(only: Only = None, as_json: AsJson = False) -> None:
    """Measure azu beside transformers, cp and Redis; exit 1 when a target is missed. Takes some minutes."""
    from azu.bench.model import ModelShape
    from azu.bench.suite import run_bench

    with Terminal(stderr=True).status("Measuring") as status:
        report = run_bench(only or (), ModelShape(), status.update)
    if as_json:
        show(report.facts(), as_json, lambda _: "")
    else:
        show(report, as_json, _drawn)
    if not report.passed:
        raise typer.Exit(1)


def _drawn(report: "BenchReport") -> "Table":
    from rich.table import Table

    table = Table(title=f"{report.cpus} cores", title_justify="left")
    table.add_column("what")
    for column in ("azu", "reference"):
        table.add_column(column, justify="right")
    table.add_column("reference is")
    for column in ("ratio", "target"):
        table.add_column(column, justify="right")
    for one in report.measured:
        for figure in one.figures:
            table.add_row(
                figure.name,
                f"{figure.value:,.2f} {figure.unit}",
                f"{figure.reference:,.2f}",
                figure.reference_name,
                f"{figure.ratio:.2f}",
                _verdict(figure),
            )
    return table


def _verdict(figure: "Measurement") -> "Text":
    from rich.text import Text

    if figure.passed is None:
        return Text()
    bound = f"≥ {figure.at_least:g}" if figure.at_least is not None else f"≤ {figure.at_most:g}"
    return Text(f"{bound} ✓", "green") if figure.passed else Text(f"{bound} ✗", "red")
