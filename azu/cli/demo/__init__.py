"""`azu demo`: the whole system on this machine, one paid prompt for each built-in model, a receipt."""

from typing import Annotated

import typer


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Run the whole network on this machine: cut, place, deposit, prompt, stream, settle, receipt."""
    from azu.cli.demo.run import run_demo
    from azu.cli.demo.show import Narrator

    report = run_demo(Narrator(quiet=as_json))
    if as_json:
        typer.echo(report.to_json())
