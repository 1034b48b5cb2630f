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


@pytest.mark.parametrize("content", ["", "[]", "not json"])
def test_a_file_that_is_no_receipt_is_refused(file: Path, content: str) -> None:
    file.write_text(content)

    done = RUNNER.invoke(app, ["receipt", "--verify", str(file), "--platform", PLATFORM.address])

    assert isinstance(done.exception, InvalidRequest)
