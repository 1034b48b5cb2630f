import json
from pathlib import Path

import pytest
from eth_account import Account
from typer.testing import CliRunner

from azu.cli.wallet import unlock, wallet
from azu.errors import ConfigurationError, InvalidRequest
from azu.money.chain.wallet import import_key
from tests.client.ingress import PLATFORM, Reply, running_ingress
from tests.money.chain.running import running_devnet

RUNNER = CliRunner()
KEY = "0x" + "0123456789" * 6 + "0123"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    monkeypatch.setenv("AZU_WALLET_PASSWORD", "correct horse")
    return tmp_path


@pytest.mark.prove
def test_a_new_wallet_is_shown_and_unlocked(home: Path) -> None:
    made = json.loads(RUNNER.invoke(wallet, ["new", "--json"]).stdout)
    shown = json.loads(RUNNER.invoke(wallet, ["show", "--json"]).stdout)

    assert made == shown == {"address": made["address"], "file": str(home / "wallet.json")}
    assert unlock(home).address.lower() == made["address"]


def test_a_key_is_imported_from_a_file_and_never_shown(home: Path) -> None:
    file = home / "key"
    file.write_text(KEY)

    done = RUNNER.invoke(wallet, ["import", "--key-file", str(file), "--json"])

    assert json.loads(done.stdout)["address"] == Account.from_key(KEY).address.lower()
    assert KEY[2:] not in done.output + (home / "wallet.json").read_text()


def test_a_password_is_asked_for_and_not_echoed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZU_WALLET_PASSWORD")

    done = RUNNER.invoke(wallet, ["import"], input=f"{KEY}\nsecret-1\nsecret-1\n")

    assert done.exit_code == 0
    assert "secret-1" not in done.output
    assert KEY[2:] not in done.output


@pytest.mark.parametrize("text", ["", "zz", KEY[:-2]])
def test_a_bad_key_is_refused_and_not_repeated(home: Path, text: str) -> None:
    file = home / "key"
    file.write_text(text)

    done = RUNNER.invoke(wallet, ["import", "--key-file", str(file)])

    assert isinstance(done.exception, InvalidRequest)
    assert not text or text not in str(done.exception)
    assert not (home / "wallet.json").exists()


def test_a_missing_wallet_is_reported_before_a_password_is_asked_for(home: Path) -> None:
    with pytest.raises(ConfigurationError, match="azu wallet new"):
        unlock(home)


def test_what_the_wallet_holds_on_the_chain_is_shown_without_a_password(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_key(home / "wallet.json", bytes.fromhex(KEY[2:]), "correct horse")
    monkeypatch.delenv("AZU_WALLET_PASSWORD")
    address = Account.from_key(KEY).address.lower()
    with running_devnet() as chain, running_ingress() as ingress:
        chain.fund(address, 125_000_000)
        ingress.replies["GET /v1/platform"] = Reply({"address": PLATFORM, "chain_url": chain.url})
        monkeypatch.setenv("AZU_URL", ingress.url)
        shown, exact = (RUNNER.invoke(wallet, ["balance", *more]).stdout for more in ([], ["--exact"]))
        facts = json.loads(RUNNER.invoke(wallet, ["balance", "--json"]).stdout)

    assert (address in shown, "1.25 HYPE" in shown, "125000000 lamports" in exact) == (True, True, True)
    assert facts == {"address": address, "lamports": 125_000_000, "chain_url": chain.url}
