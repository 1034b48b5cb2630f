"""`azu check`: whether azu can run a model, and whether its cut gives the same answer as the whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from azu.cli.output import AsJson, Listing, show, table

if TYPE_CHECKING:
    from azu.engine.check import CheckReport


def check(
    model: Annotated[str, typer.Argument(help="A model folder, a built-in model or a Hub id.")],
    stages: Annotated[int, typer.Option(help="How many stages to cut it into.", min=1)] = 2,
    experts_apart: Annotated[
        int, typer.Option(help="Spread the experts of MoE layers over this many holders.", min=0)
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Cut a model, run it stage by stage and whole, and compare; exit 0 only if the answers are equal."""
    from azu.engine.check import check as run_check
    from azu.models.sources import find_source

    folder = Path(model)
    if not folder.is_dir():
        folder = find_source(model, None, ()).weights(lambda *_: None)
    report = run_check(folder, model=model, num_stages=stages, expert_holders=experts_apart)
    show(report, as_json, _drawn)
    if not report.passed:
        raise typer.Exit(1)


def _drawn(report: "CheckReport") -> Listing:
    difference = report.max_abs_logit_diff
    rows = [
        ("architecture", report.architecture),
        ("layers", report.layers),
        ("stages", report.stages),
        ("supported", "yes" if report.supported else "no"),
        ("tokens equal", "yes" if report.tokens_equal else "no"),
        ("largest logit difference", None if difference is None else f"{difference:.1e}"),
        ("reason", report.reason),
    ]
    return table(["", report.model], [row for row in rows if row[1] is not None])
