"""`azu ticket`: which tickets there are depends on how the network's nodes are linked."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from azu.cli import app
from azu.config import NodeLinks, Settings
from azu.errors import NotFound
from azu.launch.admin import AdminFacts, admin_file_kept
from azu.launch.kept_access import kept_access

REVOKE = ["ticket", "revoke", "local"]


def token(home: Path) -> str:
    return kept_access(Settings(home=home, http_port=0)).token


def facts(nodes: NodeLinks) -> AdminFacts:
    return AdminFacts("http://127.0.0.1:9", "admin", "0" * 32, "localhost:1", None, nodes, "")


def test_the_local_ticket_is_revoked_while_its_network_runs_and_while_none_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    first = token(tmp_path)

    with admin_file_kept(tmp_path, facts(NodeLinks.LOCAL)):
        assert "next start makes a new token" in CliRunner().invoke(app, REVOKE).output
    second = token(tmp_path)
    assert CliRunner().invoke(app, REVOKE).exit_code == 0
    assert len({first, second, token(tmp_path)}) == 3


@pytest.mark.parametrize("nodes", [NodeLinks.ENCRYPTED, NodeLinks.FOREIGN])
def test_a_network_without_a_local_ticket_says_so_and_keeps_its_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: NodeLinks
) -> None:
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    first = token(tmp_path)

    with admin_file_kept(tmp_path, facts(nodes)):
        refused = CliRunner().invoke(app, REVOKE).exception
    assert isinstance(refused, NotFound)
    assert "has no ticket `local`" in refused.message
    assert token(tmp_path) == first
