"""Settings come from the environment; an unknown AZU_ variable is an error that names it."""

import os
from pathlib import Path

import pytest

from azu.config import Settings
from azu.errors import ConfigurationError

WITHOUT_PREFIX = (
    "HYPERLIQUID_RPC_URL",
    "HYPERLIQUID_ADDRESS",
    "REDIS_HOST",
    "REDIS_PORT",
    "REDIS_PASSWORD",
    "HF_TOKEN",
)


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AZU_") or name in WITHOUT_PREFIX:
            monkeypatch.delenv(name)


def test_each_setting_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")

    settings = Settings.from_environment()

    assert settings.home == Path("/home/ada/.azu")
    assert settings.url is None
    assert (settings.http_host, settings.http_port) == ("127.0.0.1", 8000)
    assert settings.redis_url is None
    assert settings.chain_url is None
    assert settings.model_roots == ()


def test_unknown_variables_of_azu_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_HTPT_PORT", "8001")
    monkeypatch.setenv("AZU_FOO", "x")

    with pytest.raises(ConfigurationError, match="AZU_FOO, AZU_HTPT_PORT"):
        Settings.from_environment()


@pytest.mark.parametrize("name", ["AZU_PRIVATE_KEY_FILE", "AZU_WALLET_PASSWORD", "AZU_TEST_SEED"])
def test_variables_that_another_process_reads_are_accepted(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "anything")

    Settings.from_environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AZU_HTTP_PORT", "65536"),
        ("AZU_HTTP_PORT", "http"),
        ("AZU_MAX_MODEL_BYTES", "much"),
        ("HYPERLIQUID_ADDRESS", "0x12"),
        ("AZU_ADMIN_ADDRESSES", "0x12"),
        ("REDIS_PORT", "-1"),
    ],
)
def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError, match=name) as refused:
        Settings.from_environment()

    assert refused.value.param == name


def test_the_platforms_private_key_is_not_among_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEDULER_PRIVATE_KEY", "0x" + "1" * 64)

    assert "1111" not in str(Settings.from_environment().model_dump())


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_PASSWORD", "HF_TOKEN", "AZU_API_KEY", "AZU_ADMIN_KEY"):
        monkeypatch.setenv(name, "hunter2")

    assert "hunter2" not in repr(Settings.from_environment())


def test_a_configured_redis_is_reached_with_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_HOST", "books.example")
    monkeypatch.setenv("REDIS_PORT", "6380")
    monkeypatch.setenv("REDIS_PASSWORD", "p@ss:/word")

    assert Settings.from_environment().redis_url == "redis://:p%40ss%3A%2Fword@books.example:6380/0"


def test_paths_with_a_tilde_and_sizes_with_units_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("AZU_MODEL_ROOTS", "/models:~/mine")
    monkeypatch.setenv("AZU_MAX_MODEL_BYTES", "3GiB")

    settings = Settings.from_environment()

    assert settings.model_roots == (Path("/models"), Path("/home/ada/mine"))
    assert settings.max_model_bytes == 3 * 1024**3


def test_the_addresses_of_admins_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_environment().admin_addresses == ()
    monkeypatch.setenv("AZU_ADMIN_ADDRESSES", f"0x{'AB' * 20}, 0x{'12' * 20}")

    assert Settings.from_environment().admin_addresses == ("0x" + "ab" * 20, "0x" + "12" * 20)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_NETWORK", "")
    monkeypatch.setenv("REDIS_HOST", "")

    settings = Settings.from_environment()

    assert settings.network is None
    assert settings.redis_url is None


def test_the_link_to_a_configured_redis_is_encrypted_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_HOST", "books.example")
    monkeypatch.setenv("AZU_REDIS_TLS", "1")

    assert Settings.from_environment().redis_url == "rediss://books.example:6379/0"

    monkeypatch.setenv("AZU_REDIS_CA", "/etc/our authority.crt")
    url = Settings.from_environment().redis_url
    assert url == "rediss://books.example:6379/0?ssl_ca_certs=/etc/our%20authority.crt"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"AZU_TLS_CERT": "/c"}, "AZU_TLS_CERT"),
        ({"AZU_TLS_KEY": "/k"}, "AZU_TLS_CERT"),
        ({"AZU_REDIS_TLS": "1"}, "AZU_REDIS_TLS"),
        ({"AZU_REDIS_CA": "/c", "REDIS_HOST": "books.example"}, "AZU_REDIS_CA"),
    ],
)
def test_an_incomplete_tls_configuration_is_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], param: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError) as refused:
        Settings.from_environment()

    assert refused.value.param == param
