"""Which network and which key a client uses when its caller names none, or some of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import azu
from azu.client import Client
from azu.client.machine import Credential, network_url, running_network, store_credential
from azu.config import NodeLinks
from azu.errors import ConfigurationError, Unauthenticated
from azu.launch.admin import AdminFacts, admin_file_kept
from tests.client.ingress import PLATFORM, Ingress, Reply, platform_of, running_ingress

PAYER = "0x" + "a1" * 20
BALANCE = {"address": PAYER, "available_lamports": 5, "reserved_lamports": 1, "withdrawing_lamports": 2}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    for name in ("AZU_URL", "AZU_API_KEY", "AZU_HTTP_PORT", "AZU_TLS_CA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def ingress() -> Iterator[Ingress]:
    with running_ingress() as running:
        running.replies["GET /v1/balance"] = Reply(BALANCE)
        yield running


def credential(key: str) -> Credential:
    return Credential(f"azu-sk-{key}", PAYER, PLATFORM)


def facts(url: str, certificate: Path | None = None) -> AdminFacts:
    return AdminFacts(url, "admin", "0" * 32, "localhost:1", certificate, NodeLinks.LOCAL, "")


def test_a_client_without_anything_uses_the_network_that_runs_here_and_the_key_of_its_login(
    home: Path, ingress: Ingress
) -> None:
    store_credential(home, ingress.url, credential("here"))
    store_credential(home, "http://127.0.0.1:9", credential("elsewhere"))

    with admin_file_kept(home, facts(ingress.url)):
        assert azu.Client().balance().available_lamports == 5

    assert [one.authorization for one in ingress.requests] == ["Bearer azu-sk-here"]


def test_without_a_network_here_the_last_login_says_which(home: Path, ingress: Ingress) -> None:
    for url, key in ((ingress.url, "old"), ("http://127.0.0.1:9", "other"), (ingress.url, "new")):
        store_credential(home, url, credential(key))

    Client().balance()

    assert [one.authorization for one in ingress.requests] == ["Bearer azu-sk-new"]


def test_the_environment_goes_before_what_is_stored_and_an_argument_before_both(
    home: Path, ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_credential(home, ingress.url, credential("stored"))
    monkeypatch.setenv("AZU_API_KEY", "environment")

    Client(ingress.url, "argument").balance()
    Client(ingress.url).balance()
    # Its key is that of its network, and no other one hears it.
    monkeypatch.setenv("AZU_URL", "http://127.0.0.1:9")
    Client(ingress.url).balance()
    monkeypatch.delenv("AZU_API_KEY")
    Client(ingress.url).balance()
    Client(ingress.url, "").balance()

    sent = [one.authorization for one in ingress.requests]
    stored = ["Bearer azu-sk-stored"] * 2
    assert sent == ["Bearer argument", "Bearer environment", *stored, None]
    assert Client().url == "http://127.0.0.1:9"


def test_without_any_network_the_place_is_that_of_azu_up(home: Path) -> None:
    assert network_url(home) == "http://127.0.0.1:8000"
    assert network_url(home, 8123) == "http://127.0.0.1:8123"
    assert not Client().has_key


def test_the_platform_of_the_login_is_the_only_one_that_is_used(home: Path, ingress: Ingress) -> None:
    store_credential(home, ingress.url, credential("here"))
    platform_of(ingress, "0x" + "66" * 20)

    with pytest.raises(Unauthenticated, match=PLATFORM):
        Client().platform()


def test_a_damaged_file_of_the_running_network_is_named(home: Path) -> None:
    (home / "admin.json").write_text("{}")

    with pytest.raises(ConfigurationError, match=r"admin\.json is damaged"):
        running_network(home)
