"""`azu join` takes a ticket, lends no more than there is, and ends once its ticket has ended."""

import os
import socket
import sys
from pathlib import Path

import pytest

from azu.cli.join import (
    _on_the_heads_machine,
    _own_name,
    _watch,
    _workers,
    lending_terms,
    ticket_word,
)
from azu.cluster.lending import TERMS, Hours, LendingTerms
from azu.config import NodeLinks
from azu.errors import ConfigurationError, Conflict, InvalidRequest, Unauthenticated
from azu.launch.admin import AdminFacts, admin_file_kept
from azu.launch.membership import Ticket, membership_of
from azu.launch.processes import ProcessGroup, ProcessSpec, free_port
from azu.launch.ray_nodes import RayHost, Worker
from azu.units import GIB, MIB

# What Ray prints when a node has joined; the node ends with its head.
NODE = "print('Ray runtime started.', flush=True); import time; time.sleep(0.2)"
WORKER = Worker(0, "ada", 8 * MIB, "0x" + "a1" * 20)


def ticket(port: int) -> Ticket:
    return Ticket(port=port, token="ab" * 32, network="cd" * 16)


def test_a_node_whose_network_was_started_again_is_not_started_for_ever(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        membership = membership_of(ticket(head.getsockname()[1]), tmp_path, name="ada", host="127.0.0.1")
        access = membership.access()
    spec = ProcessSpec("ada", (sys.executable, "-c", NODE), dict(os.environ), restart=True)

    with ProcessGroup(tmp_path / "logs") as nodes:
        nodes.start(spec)
        with pytest.raises(Unauthenticated, match="earlier start of the network: join with the one"):
            _watch(nodes, [WORKER], membership, access, lambda: None)


def test_a_port_that_a_later_start_of_the_network_got_does_not_make_the_ticket_good(tmp_path: Path) -> None:
    refused = "print('E gcs_client.cc: RPC error: InvalidAuthToken', flush=True); import time; time.sleep(60)"
    with socket.create_server(("127.0.0.1", 0)) as head, ProcessGroup(tmp_path / "logs") as nodes:
        membership = membership_of(ticket(head.getsockname()[1]), tmp_path, name="ada", host="127.0.0.1")
        nodes.start(ProcessSpec("ada", (sys.executable, "-c", refused), dict(os.environ), restart=True))
        with pytest.raises(Unauthenticated, match="earlier start of the network"):
            _watch(nodes, [WORKER], membership, membership.access(), lambda: None)


def test_an_old_ticket_of_the_network_that_runs_here_is_called_old(tmp_path: Path) -> None:
    old, facts = ticket(free_port()), AdminFacts("http://a", "k", "cd" * 16, "a:1", None, NodeLinks.LOCAL, "")

    with admin_file_kept(tmp_path, facts), pytest.raises(ConfigurationError, match="an earlier start"):
        _on_the_heads_machine(old, None, tmp_path)
    with pytest.raises(ConfigurationError, match="not encrypted"):
        _on_the_heads_machine(old, None, tmp_path)


def test_two_joins_of_one_machine_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    host = f"host-{os.getpid()}"
    monkeypatch.setattr(socket, "gethostname", lambda: host)

    with _own_name(None) as first, _own_name(None) as second, _own_name(f"{host}-c") as third:
        assert (first, second, third) == (host, f"{host}.2", f"{host}-c")
        with pytest.raises(Conflict, match=f"lends as {host}-c already: give another --name"):
            _own_name(third).__enter__()
    with _own_name(None) as again:
        assert again == host


def test_the_ticket_comes_from_a_word_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ticket"
    file.write_text("from-the-file\n")
    with pytest.raises(ConfigurationError, match=r"no ticket: .*--ticket-file FILE.*AZU_TICKET"):
        ticket_word(None, None)
    monkeypatch.setenv("AZU_TICKET", "from-the-environment")

    assert ticket_word("word", None) == "word"
    assert ticket_word(None, file).strip() == "from-the-file"
    assert ticket_word(None, None) == "from-the-environment"
    with pytest.raises(ConfigurationError, match="not both"):
        ticket_word("word", file)
    with pytest.raises(ConfigurationError, match="absent"):
        ticket_word(None, tmp_path / "absent")


def test_the_terms_of_the_command_line_reach_the_node() -> None:
    terms = lending_terms(hours="22-07", max_celsius=80, yields=True, disk="10GiB", bandwidth="20MiB")
    assert terms == LendingTerms(Hours(22 * 60, 7 * 60), 80, True, 10 * GIB, 20 * MIB)
    assert lending_terms() == LendingTerms()

    (worker,) = _workers("ada", "8MiB", WORKER.payout_address, lending_terms(disk="8MiB"), cpu=True)
    environment = RayHost(Path("/tmp/azu"), Path("/tmp/token")).worker("a:1", worker).environment
    assert LendingTerms.from_json(environment[TERMS]) == worker.terms


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"hours": "late"}, "late is no part of a day"),
        ({"disk": "some"}, "is not a size"),
        ({"bandwidth": "much"}, "is not a size"),
        ({"disk": "4MiB"}, "give --disk more"),
    ],
)
def test_terms_that_a_node_cannot_keep_are_refused(given: dict[str, str], fault: str) -> None:
    with pytest.raises((InvalidRequest, ConfigurationError), match=fault):
        _workers("ada", "8MiB", WORKER.payout_address, lending_terms(**given), cpu=True)
