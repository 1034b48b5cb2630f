"""`azu jobs --csv` is a statement: a line for each job, or for each day and key."""

import csv
import io
from pathlib import Path

import pytest

from azu.api.base import ErrorDetail
from azu.api.jobs import JobLine
from azu.cli.jobs import _days, _lines
from azu.cli.output import show_csv
from tests.cli.test_main import azu
from tests.client.ingress import Reply, running_ingress

DAY_MS = 86_400_000


def line(job_id: str, at_ms: int, key_id: str, charged: int | None, model: str = "m") -> JobLine:
    tokens = None if charged is None else charged // 10
    error = ErrorDetail(message="worker lost", type="server_error", param=None, code="worker_lost")
    return JobLine(
        job_id=job_id, model=model, status="done", created_at_ms=at_ms, reserved_lamports=0,
        finish_reason="stop", charged_lamports=charged, released_lamports=0, error=error, key_id=key_id,
        prompt_tokens=tokens, completion_tokens=tokens,
    )  # fmt: skip


# The newest comes first.
JOBS = [
    line("job-4", 2 * DAY_MS, "key-1", None),
    line("job-3", DAY_MS + 5, "key-2", 100),
    line("job-2", DAY_MS + 4, "key-1", 20),
    line("job-1", DAY_MS + 3, "key-1", 30),
]


def test_a_statement_has_a_line_for_each_job_the_oldest_first() -> None:
    first, *_, last = _lines(JOBS, exact=False)

    assert first == {
        "job": "job-1", "created_utc": "1970-01-02 00:00:00", "key": "key-1", "model": "m", "status": "done",
        "prompt_tokens": 3, "completion_tokens": 3, "charged_hype": "0.0000003",
    }  # fmt: skip
    assert (last["job"], last["charged_hype"]) == ("job-4", "")


def test_a_statement_by_day_sums_the_jobs_of_each_key() -> None:
    found = _days(JOBS, exact=True)

    assert [(one["day_utc"], one["key"], one["jobs"], one["charged_lamports"]) for one in found] == [
        ("1970-01-02", "key-1", 2, "50"),
        ("1970-01-02", "key-2", 1, "100"),
        ("1970-01-03", "key-1", 1, "0"),
    ]


def test_no_cell_has_a_second_line_or_begins_a_formula(capsys: pytest.CaptureFixture[str]) -> None:
    show_csv([{"model": "=HYPERLINK(1)", "tokens": -1}, {"model": 'a "b",\nc', "tokens": None}])

    assert list(csv.DictReader(io.StringIO(capsys.readouterr().out))) == [
        {"model": "'=HYPERLINK(1)", "tokens": "-1"},
        {"model": 'a "b",\\nc', "tokens": ""},
    ]


@pytest.mark.prove
def test_all_jobs_are_in_the_statement(tmp_path: Path) -> None:
    with running_ingress() as ingress:
        data = [one.model_dump(mode="json") for one in JOBS]
        ingress.replies |= {
            "GET /v1/jobs?limit=1000": Reply({"data": data[:2]}),
            "GET /v1/jobs?limit=1000&before=job-3": Reply({"data": data[2:]}),
            "GET /v1/jobs?limit=1000&before=job-1": Reply({"data": []}),
        }
        done = azu("jobs", "--csv", "--by-day", home=tmp_path, AZU_URL=ingress.url, AZU_API_KEY="k")

    assert [one["key"] for one in csv.DictReader(io.StringIO(done.stdout))] == ["key-1", "key-2", "key-1"]


EARNED = ((DAY_MS + 7_200_000, "m", 5), (DAY_MS, "m", 2), (DAY_MS, "n", 3), (0, "m", 1))


def test_what_was_earned_is_a_line_for_each_day_and_model(tmp_path: Path) -> None:
    hours = [{"at_ms": at_ms, "model_id": model, "lamports": lamports} for at_ms, model, lamports in EARNED]
    earned = {"earned_lamports": 11, "paying_lamports": 0, "paid_lamports": 0, "payout_threshold_lamports": 9}
    with running_ingress() as ingress:
        ingress.replies["GET /v1/earnings?days=30"] = Reply(earned | {"address": "0xa", "by_hour": hours})
        done = azu("earnings", "--csv", "--exact", home=tmp_path, AZU_URL=ingress.url, AZU_API_KEY="k")

    found = [tuple(one.values()) for one in csv.DictReader(io.StringIO(done.stdout))]
    assert sorted(found) == [
        ("1970-01-01", "0xa", "m", "1"), ("1970-01-02", "0xa", "m", "7"), ("1970-01-02", "0xa", "n", "3"),
    ]  # fmt: skip
