"""A receipt in a file is checked without the network."""

import json
from pathlib import Path

import pytest
from eth_account import Account
from typer.testing import CliRunner

from azu.auth.signatures import sealed
from azu.cli import app
from azu.client.machine import Credential, store_credential
from azu.errors import InvalidRequest, Unauthenticated
from tests.builders import receipt, receipt_signed
from tests.client.ingress import Reply, running_ingress

RUNNER = CliRunner()
PLATFORM = Account.from_key("0x" + "09" * 32)
URL = "http://127.0.0.1:9"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    monkeypatch.setenv("AZU_URL", URL)
    document = sealed(receipt(), PLATFORM.address.lower(), receipt_signed(PLATFORM, receipt()))
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(document))
    return path


def test_a_receipt_is_checked_against_the_platform_of_the_login(file: Path) -> None:
    store_credential(file.parent, URL, Credential("azu-sk-x", "0x" + "a1" * 20, PLATFORM.address.lower()))

    done = RUNNER.invoke(app, ["receipt", "--verify", str(file), "--json"])

    assert done.exit_code == 0
    assert json.loads(done.stdout)["signed_by"] == PLATFORM.address.lower()


def test_a_receipt_is_checked_against_a_given_platform(file: Path) -> None:
    good = RUNNER.invoke(app, ["receipt", "--verify", str(file), "--platform", PLATFORM.address])
    bad = RUNNER.invoke(app, ["receipt", "--verify", str(file), "--platform", "0x" + "12" * 20])

    assert good.exit_code == 0
    assert "signed by the platform" in good.stdout
    assert isinstance(bad.exception, InvalidRequest)


def test_a_changed_receipt_is_refused(file: Path) -> None:
    file.write_text(file.read_text().replace('"charged_lamports": 80', '"charged_lamports": 8'))

    done = RUNNER.invoke(app, ["receipt", "--verify", str(file), "--platform", PLATFORM.address])

    assert isinstance(done.exception, InvalidRequest)


def test_a_receipt_of_an_unknown_platform_is_refused(file: Path) -> None:
    done = RUNNER.invoke(app, ["receipt", "--verify", str(file)])

    assert isinstance(done.exception, Unauthenticated)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (
            {"state": "held", "held_lamports": 8000},
            "disputed: 0.00008 HYPE are held until the network's admin decides",
        ),
        ({"state": "reversed", "returned_lamports": 8000}, "reversed: 0.00008 HYPE went back to the payer"),
        ({"state": "dismissed"}, "disputed and dismissed"),
        ({"state": "none"}, ""),
    ],
)
def test_a_receipt_shows_what_became_of_the_money(
    file: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, object], told: str
) -> None:
    document = json.loads(file.read_text())
    with running_ingress() as ingress:
        monkeypatch.setenv("AZU_URL", ingress.url)
        monkeypatch.setenv("AZU_API_KEY", "k")
        ingress.replies["GET /v1/receipts/job-1"] = Reply(document)
        ingress.replies["GET /v1/jobs/job-1/dispute"] = Reply({"job_id": "job-1", "held_lamports": 0} | state)
        shown = RUNNER.invoke(app, ["receipt", "job-1"], env={"COLUMNS": "100"})
        as_json = RUNNER.invoke(app, ["receipt", "job-1", "--json"])

    assert shown.exit_code == 0
    assert told in shown.output
    assert bool(told) is ("disputed" in shown.output or "reversed" in shown.output)
    # What the platform signed stays as it is.
    assert json.loads(as_json.stdout) == document
    assert told in as_json.stderr


@pytest.mark.parametrize("content", ["", "[]", "not json"])
def test_a_file_that_is_no_receipt_is_refused(file: Path, content: str) -> None:
    file.write_text(content)

    done = RUNNER.invoke(app, ["receipt", "--verify", str(file), "--platform", PLATFORM.address])

    assert isinstance(done.exception, InvalidRequest)
