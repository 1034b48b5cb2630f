"""`azu doctor`: is this machine fit, is the network well, what is encrypted, and what to do where not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from azu.cli.output import AsJson, Listing, show, table

if TYPE_CHECKING:
    from rich.console import Group

    from azu.cli.doctor_checks import Diagnosis, Finding


_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "bad": ("✗", "red"), "unknown": ("?", "dim")}


def doctor(as_json: AsJson = False) -> None:
    """Check this machine and the network that it runs or uses; exit 1 when something is bad."""
    from azu.cli.doctor_checks import diagnose
    from azu.config import Settings

    diagnosis = diagnose(Settings.from_environment())
    show(diagnosis, as_json, _drawn)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _drawn(diagnosis: "Diagnosis") -> "Group":
    from rich.console import Group

    return Group(_part("this machine", diagnosis.machine), _part("the network", diagnosis.network))


def _part(title: str, findings: "Sequence[Finding]") -> Listing:
    from rich.text import Text

    rows = [(Text(*_MARKS[one.state.value]), one.about, one.found, one.advice) for one in findings]
    return table(["", "what", "found", "to do"], rows, title=title)
