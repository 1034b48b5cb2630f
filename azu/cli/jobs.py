"""`azu jobs`: what was asked, and what each day, key and job cost."""

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from azu.cli.credentials import open_client
from azu.cli.output import AsCsv, AsJson, Exact, amount, day, done, show, show_csv, table, unit, utc

if TYPE_CHECKING:
    from azu.api.jobs import JobLine
    from azu.client import Client

_AT_ONCE = 1000


def jobs(
    limit: Annotated[
        int | None, typer.Option(min=1, help="How many, newest first; 20, or all of 90 days in CSV.")
    ] = None,
    delete: Annotated[
        str | None,
        typer.Option(metavar="JOB", help="Remove this job's prompt and answer; its receipt stays."),
    ] = None,
    as_csv: AsCsv = False,
    by_day: Annotated[
        bool, typer.Option("--by-day", help="As CSV, a line for each day (UTC) and key.")
    ] = False,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Show the address's jobs with their errors and charges, or as CSV; or delete the texts of one."""
    as_csv = as_csv or by_day
    client = open_client()
    if delete is not None:
        job_id = client.delete_job(delete)
        show({"deleted": job_id}, as_json, lambda _: done(f"{job_id} has no prompt and no answer any more"))
        return
    found = _latest(client, sys.maxsize if as_csv and limit is None else limit or 20)
    if as_csv:
        show_csv(_days(found, exact) if by_day else _lines(found, exact))
    else:
        show(found, as_json, lambda found: drawn(found, exact))


def _latest(client: "Client", limit: int) -> "list[JobLine]":
    """Return so many jobs, newest first, or all where there are fewer."""
    found = client.jobs(min(limit, _AT_ONCE))
    while found and limit > max(len(found), _AT_ONCE):
        older = client.jobs(min(limit - len(found), _AT_ONCE), found[-1].job_id)
        if not older:
            break
        found += older
    return found


def drawn(found: "Sequence[JobLine]", exact: bool = False) -> Group:
    """Draw jobs as a table."""
    rows = [
        (
            job.job_id,
            job.model,
            job.status,
            time.strftime("%m-%d %H:%M", time.localtime(job.created_at_ms / 1000)),
            amount(job.charged_lamports, exact),
        )
        for job in found
    ]
    # An error is a sentence or two: no column is wide enough for it.
    errors = [Text(f"{job.job_id}: {job.error.message}", style="yellow") for job in found if job.error]
    waiting = [Text(f"{job.job_id}: {job.phase.text}", style="dim") for job in found if job.phase]
    columns = ["job", "model", "status", "created", f"charged {unit(exact)}"]
    return Group(table(columns, rows, lines=False), *waiting, *errors)


def _lines(found: "Sequence[JobLine]", exact: bool) -> list[dict[str, object]]:
    """Return a line of a statement for each job, the oldest first."""
    return [
        {
            "job": job.job_id,
            "created_utc": utc(job.created_at_ms),
            "key": job.key_id,
            "model": job.model,
            "status": job.status,
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": job.completion_tokens,
            f"charged_{unit(exact).lower()}": amount(job.charged_lamports, exact),
        }
        for job in reversed(found)
    ]


def _days(found: "Sequence[JobLine]", exact: bool) -> list[dict[str, object]]:
    """Return a line of a statement for each day and key, the oldest first."""
    days: defaultdict[tuple[str, str], list[JobLine]] = defaultdict(list)
    for job in reversed(found):
        days[day(job.created_at_ms), job.key_id].append(job)
    return [
        {
            "day_utc": at,
            "key": key_id,
            "jobs": len(of_day),
            "prompt_tokens": sum(job.prompt_tokens or 0 for job in of_day),
            "completion_tokens": sum(job.completion_tokens or 0 for job in of_day),
            f"charged_{unit(exact).lower()}": amount(sum(job.charged_lamports or 0 for job in of_day), exact),
        }
        for (at, key_id), of_day in days.items()
    ]
