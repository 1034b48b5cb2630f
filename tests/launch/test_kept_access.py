"""A network that is started again is reached as before."""

import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from azu.config import Settings
from azu.errors import ConfigurationError, NotFound
from azu.launch.kept_access import forget_token, kept_access


def settings(home: Path, **changed: object) -> Settings:
    return Settings.model_construct(home=home, http_port=0, admin_key=None, **changed)


def test_a_later_start_has_the_ports_the_token_and_the_admin_key_of_before(tmp_path: Path) -> None:
    first = kept_access(settings(tmp_path))

    assert kept_access(settings(tmp_path)) == first
    assert stat.S_IMODE((tmp_path / "access.json").stat().st_mode) == 0o600
    assert first.token not in repr(first)
    assert first.admin_key not in repr(first)


def test_a_new_token_and_admin_key_are_made_only_when_asked_for(tmp_path: Path) -> None:
    first = kept_access(settings(tmp_path))

    anew = kept_access(settings(tmp_path), new_token=True)

    assert anew.token != first.token
    assert anew.admin_key != first.admin_key
    assert (anew.head_port, anew.http_port) == (first.head_port, first.http_port)
    assert kept_access(settings(tmp_path)) == anew


def test_a_revoked_ticket_makes_a_new_token_at_the_next_start(tmp_path: Path) -> None:
    first = kept_access(settings(tmp_path))

    forget_token(tmp_path)

    later = kept_access(settings(tmp_path))
    assert later == replace(first, token=later.token)
    assert later.token != first.token


def test_no_token_is_forgotten_where_no_network_ever_ran(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no network ever ran"):
        forget_token(tmp_path)


def test_a_port_that_another_program_has_now_is_replaced(tmp_path: Path) -> None:
    first = kept_access(settings(tmp_path))

    with socket.create_server(("127.0.0.1", first.head_port)):
        later = kept_access(settings(tmp_path))

    assert later == replace(first, head_port=later.head_port)
    assert later.head_port != first.head_port


def test_the_settings_come_first_and_their_key_is_not_kept(tmp_path: Path) -> None:
    first = kept_access(settings(tmp_path))

    given = Settings.model_construct(home=tmp_path, http_port=8123, admin_key=SecretStr("own"))

    assert kept_access(given) == replace(first, http_port=8123, admin_key="own")
    assert kept_access(settings(tmp_path)).admin_key == first.admin_key


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "access.json").write_text('{"token": 5}')

    with pytest.raises(ConfigurationError, match=r"access\.json: token"):
        kept_access(settings(tmp_path))
