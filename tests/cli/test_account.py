"""`azu login` pins a network, and later commands use no other."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from eth_account import Account
from typer.testing import CliRunner

from azu.auth.network_id import PLATFORMS_FILE, network_id
from azu.auth.succession import keep_succession, sign_succession
from azu.cli import app
from azu.cli.credentials import known_platforms
from azu.client.machine import Credential, store_credential, stored_credential
from azu.config import NodeLinks, Settings
from azu.errors import AzuError, Unauthenticated
from azu.launch.admin import AdminFacts, admin_file_kept
from tests.client.ingress import PLATFORM, Ingress, Reply, platform_of, running_ingress, signing_in
from tests.few import few

RUNNER = CliRunner()
ID = network_id(PLATFORM, None)
STRANGER = "0x" + "66" * 20


@pytest.fixture
def ingress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ingress]:
    """A network, and a machine with a wallet."""
    wallet = Account.encrypt("0x" + "07" * 32, "walk", kdf="pbkdf2", iterations=2)
    (tmp_path / "wallet.json").write_text(json.dumps(wallet))
    (tmp_path / "wallet.json").chmod(0o600)
    with running_ingress() as running:
        monkeypatch.setenv("AZU_HOME", str(tmp_path))
        monkeypatch.setenv("AZU_URL", running.url)
        monkeypatch.setenv("AZU_WALLET_PASSWORD", "walk")
        signing_in(running)
        yield running


def said(*words: str) -> str:
    done = RUNNER.invoke(app, [*words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def refusal(*words: str) -> AzuError:
    done = RUNNER.invoke(app, [*words])
    assert isinstance(done.exception, AzuError), done.output
    return done.exception


def paths(ingress: Ingress) -> set[str]:
    return {request.path for request in ingress.requests}


def test_a_login_with_the_id_pins_the_network(ingress: Ingress, tmp_path: Path) -> None:
    output = said("login", f"{ingress.url}/#{ID}")

    assert "not checked" not in output
    assert "Logged in" in output
    pinned = stored_credential(tmp_path, ingress.url)
    assert pinned is not None
    assert (pinned.network_id, pinned.platform) == (ID, PLATFORM)


def test_a_login_without_the_id_warns_in_one_line_that_names_it(ingress: Ingress, tmp_path: Path) -> None:
    (warning,) = [line for line in said("login").splitlines() if "not checked" in line]

    assert ID in warning
    assert len(warning) < 80
    pinned = stored_credential(tmp_path, ingress.url)
    assert pinned is not None
    assert pinned.network_id == ""


def test_a_network_with_another_id_is_not_logged_in_to(ingress: Ingress, tmp_path: Path) -> None:
    assert isinstance(refusal("login", f"{ingress.url}#{'0' * 32}"), Unauthenticated)

    assert paths(ingress) == {"/v1/platform"}
    assert stored_credential(tmp_path, ingress.url) is None


def test_a_pinned_network_that_changed_is_not_logged_in_to_again(ingress: Ingress) -> None:
    said("login", f"{ingress.url}#{ID}")
    signing_in(ingress, platform=STRANGER)
    platform_of(ingress, STRANGER)

    assert isinstance(refusal("login"), Unauthenticated)
    # Its owner may say that it is the same network with another platform.
    assert "not checked" not in said("login", f"{ingress.url}#{network_id(STRANGER, None)}")


@pytest.mark.parametrize("login", [("login",), ("login", "#id")])
@pytest.mark.parametrize("command", few(["deposit 1", "withdraw 1", "earnings --claim", "dispute job-1"]))
def test_nothing_is_sent_or_signed_for_another_platform(
    ingress: Ingress, login: tuple[str, ...], command: str
) -> None:
    said(*[word.replace("#id", f"{ingress.url}#{ID}") for word in login])
    platform_of(ingress, STRANGER)
    ingress.requests.clear()

    assert PLATFORM in refusal(*command.split()).message
    assert paths(ingress) == {"/v1/platform"}


def test_a_new_key_of_the_platform_is_told_at_the_next_login_and_used_only_after_it(
    ingress: Ingress, tmp_path: Path
) -> None:
    old, new = (Account.from_key(f"0x{number:064x}") for number in (1, 2))
    before, now = old.address.lower(), new.address.lower()
    signing_in(ingress, platform=before)
    platform_of(ingress, before)
    said("login", f"{ingress.url}#{network_id(before, None)}")
    signing_in(ingress, platform=now)
    body = {"address": now, "chain_url": "", "successions": [asdict(sign_succession(old, new))]}
    ingress.replies["GET /v1/platform"] = Reply(body)
    refused = refusal("deposit", "1")
    assert refused.code == "platform_replaced"
    assert "`azu login` again" in refused.message

    output = " ".join(said("login").split())

    assert (
        f"the platform is {new.address.lower()} now; its old key, {old.address.lower()}, has signed" in output
    )
    pinned = stored_credential(tmp_path, ingress.url)
    assert pinned is not None
    assert (pinned.platform, pinned.former) == (now, (before,))
    assert pinned.network_id == network_id(now, None)
    assert "the platform is" not in said("login")
    # Receipts of before stay good.
    assert known_platforms() == (now, before)


def test_a_login_without_an_id_goes_from_the_known_platform_to_its_successor_alone(
    ingress: Ingress, tmp_path: Path
) -> None:
    old, new = (Account.from_key(f"0x{number:064x}") for number in (1, 2))
    before, now = old.address.lower(), new.address.lower()
    signing_in(ingress, platform=before)
    platform_of(ingress, before)
    said("login")
    signing_in(ingress, platform=now)
    platform_of(ingress, now)
    refused = refusal("login")
    assert isinstance(refused, Unauthenticated)
    assert before in refused.message
    pinned = stored_credential(tmp_path, ingress.url)
    assert pinned is not None
    assert pinned.platform == before

    body = {"address": now, "chain_url": "", "successions": [asdict(sign_succession(old, new))]}
    ingress.replies["GET /v1/platform"] = Reply(body)
    output = " ".join(said("login").split())

    assert f"the platform is {now} now; its old key, {before}, has signed that" in output
    assert f"The network's id is {network_id(now, None)}: compare it with the owner's" in output


def test_receipts_of_a_former_platform_stay_good_where_the_setting_names_the_new_one(
    ingress: Ingress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (Account.from_key(f"0x{number:064x}") for number in (1, 2))
    before, now = old.address.lower(), new.address.lower()
    monkeypatch.setenv("HYPERLIQUID_ADDRESS", new.address)
    assert known_platforms() == (now,)
    home = Settings.from_environment().money_home
    home.mkdir(parents=True, exist_ok=True)
    keep_succession(home / PLATFORMS_FILE, sign_succession(old, new))
    assert known_platforms() == (now, before)
    # A user has no such home, but a login.
    (home / PLATFORMS_FILE).unlink()
    store_credential(tmp_path, ingress.url, Credential("sk", STRANGER, now, former=(before,)))
    assert known_platforms() == (now, before)


@pytest.mark.prove
def test_a_dispute_says_what_is_held(ingress: Ingress) -> None:
    said("login")
    ingress.replies["POST /v1/jobs/job-1/dispute"] = Reply({"job_id": "job-1", "held_lamports": 80})

    assert "0.0000008 HYPE of job-1 are held" in said("dispute", "job-1")
    shown = json.loads(said("dispute", "job-1", "--json"))
    assert (shown["job_id"], shown["held_lamports"]) == ("job-1", 80)


def test_a_new_key_is_printed_and_this_machine_goes_on_with_its_own(ingress: Ingress, tmp_path: Path) -> None:
    said("login")
    before = (tmp_path / "credentials.json").read_text()

    opened = said("keys", "new", "--label", "bot", "--limit", "0.5", "--days", "2").strip()

    assert opened.startswith("azu-sk-")
    assert opened not in before
    assert (tmp_path / "credentials.json").read_text() == before
    asked = [one.body for one in ingress.requests if one.path == "/v1/auth/challenge"][-1]
    assert asked["label"] == "bot"
    assert asked["spend_limit_lamports"] == 50_000_000
    assert asked["expires_at_ms"] is not None


def test_a_login_elsewhere_says_how_to_use_it(ingress: Ingress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_URL", "http://127.0.0.1:9")

    assert f"export AZU_URL={ingress.url}" in said("login", f"{ingress.url}#{ID}")


def test_a_login_without_an_argument_goes_to_the_network_that_runs_here_and_checks_its_id(
    ingress: Ingress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZU_URL")
    facts = AdminFacts(ingress.url, "admin", ID, "localhost:1", None, NodeLinks.LOCAL, "")
    with admin_file_kept(tmp_path, facts):
        output = said("login")

    assert "not checked" not in output
    assert "export" not in output
    pinned = stored_credential(tmp_path, ingress.url)
    assert pinned is not None
    assert pinned.network_id == ID


def test_a_login_without_a_network_here_goes_to_the_port_of_the_setting(
    ingress: Ingress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZU_URL")
    monkeypatch.setenv("AZU_HTTP_PORT", ingress.url.rpartition(":")[2])

    assert f"Logged in to {ingress.url}" in said("login")


def test_what_a_login_opened_is_shown_as_lines_for_a_shell(ingress: Ingress, tmp_path: Path) -> None:
    assert ingress.url in refusal("login", "--show").message
    said("login")
    opened = stored_credential(tmp_path, ingress.url)
    assert opened is not None
    ingress.requests.clear()

    assert said("login", "--show") == f"export AZU_URL={ingress.url} AZU_API_KEY={opened.api_key}\n"
    assert not ingress.requests
