"""A command in the background: what it shows comes back, and why it did not come up."""

import sys
from pathlib import Path

import pytest

from azu.chain import wallet
from azu.cli.network.background import in_background
from azu.errors import Unavailable

TIMEOUT_S = 60.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    return tmp_path


def test_what_it_shows_comes_back_and_only_its_owner_can_read_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = wallet.create(home / "wallet.json", "password").address.lower()
    monkeypatch.setattr(sys, "argv", ["azu", "wallet", "show", "--background"])

    assert in_background(home, TIMEOUT_S)["address"] == address
    files = [home / "background.json", home / "logs" / "background.log"]
    assert [file.stat().st_mode & 0o077 for file in files] == [0, 0]


def test_why_it_did_not_come_up_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["azu", "wallet", "show", "--background"])

    with pytest.raises(Unavailable, match="there is no wallet"):
        in_background(home, TIMEOUT_S)


def test_what_a_bad_option_says_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["azu", "wallet", "show", "--nothing", "--background"])

    with pytest.raises(Unavailable, match="No such option"):
        in_background(home, TIMEOUT_S)
