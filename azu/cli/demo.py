"""`azu demo`: the whole system on this machine, with one paid prompt for each built-in model."""

from typing import Annotated

import typer


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Run the whole network on this machine: cut, place, deposit, prompt, stream, settle, receipt."""
    from azu.cli.demo_run import run_demo
    from azu.cli.output import ProgressPrinter

    report = run_demo(ProgressPrinter(quiet=as_json))
    if as_json:
        typer.echo(report.to_json())
