"""`azu join` takes a ticket, lends no more than there is, and goes on with a network that starts again."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
from eth_account import Account

from azu.api.network import NetworkResponse
from azu.cli.join import _have_claimed, _options, _show_offer, _workers, lending_terms, ticket_word
from azu.cli.join_run import Shown, on_the_heads_machine, own_name, told, watch
from azu.client import Client
from azu.cluster.lending import TERMS, Hours, LendingTerms
from azu.config import NodeLinks
from azu.errors import ConfigurationError, Conflict, InvalidRequest, Unauthenticated
from azu.launch.admin import AdminFacts, admin_file_kept
from azu.launch.membership import Ticket, membership_of
from azu.launch.processes import ProcessGroup, ProcessSpec, free_port
from azu.launch.ray_nodes import RayHost, Worker
from azu.units import GIB, MIB
from tests.client.ingress import Reply, platform_of, running_ingress

# A node as `ray start` prints: it joins and ends with its head, and at its second start its token is refused.
NODE = """
import pathlib, sys, time
first = pathlib.Path(sys.argv[1])
print("E gcs_client.cc: InvalidAuthToken" if first.exists() else "Ray runtime started.", flush=True)
time.sleep(60 if first.exists() else 0.2)
"""
WORKER = Worker(0, "ada", 8 * MIB, "0x" + "a1" * 20)
QUIET = Shown(None, [WORKER], lambda: None)
EARNED = {"earned_lamports": 5_000_000, "paying_lamports": 0, "paid_lamports": 2_000_000}


def ticket(port: int) -> Ticket:
    return Ticket(port=port, token="ab" * 32, network="cd" * 16)


def test_a_node_is_started_again_until_its_token_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        membership = membership_of(ticket(head.getsockname()[1]), tmp_path, name="ada", host="127.0.0.1")
        access = membership.access()
    first = tmp_path / "first"

    def each_start() -> dict[str, str]:
        starts.append(None)
        if len(starts) == 2:
            first.touch()
        return {}

    starts: list[None] = []
    command = (sys.executable, "-c", NODE, str(first))
    spec = ProcessSpec("ada", command, dict(os.environ), restart=True, each_start=each_start)
    with ProcessGroup(tmp_path / "logs") as nodes:
        nodes.start(spec)
        # No head answers meanwhile, which does not end it.
        with pytest.raises(Unauthenticated, match="this ticket is dead"):
            watch(nodes, [WORKER], membership, access, lambda: None, QUIET)
    assert len(starts) == 2
    assert " ".join(capsys.readouterr().out.split()).count("no network answers at") == 1


@pytest.mark.prove
def test_a_port_of_another_network_does_not_make_the_ticket_good(tmp_path: Path) -> None:
    refused = "print('E gcs_client.cc: RPC error: InvalidAuthToken', flush=True); import time; time.sleep(60)"
    with socket.create_server(("127.0.0.1", 0)) as head, ProcessGroup(tmp_path / "logs") as nodes:
        membership = membership_of(ticket(head.getsockname()[1]), tmp_path, name="ada", host="127.0.0.1")
        nodes.start(ProcessSpec("ada", (sys.executable, "-c", refused), dict(os.environ), restart=True))
        with pytest.raises(Unauthenticated, match="this ticket is dead"):
            watch(nodes, [WORKER], membership, membership.access(), lambda: None, QUIET)


def test_an_old_ticket_of_the_network_that_runs_here_is_called_dead(tmp_path: Path) -> None:
    old, facts = ticket(free_port()), AdminFacts("http://a", "k", "cd" * 16, "a:1", None, NodeLinks.LOCAL, "")

    with admin_file_kept(tmp_path, facts), pytest.raises(ConfigurationError, match="ticket is dead"):
        on_the_heads_machine(old, None, tmp_path)
    with pytest.raises(ConfigurationError, match="not encrypted"):
        on_the_heads_machine(old, None, tmp_path)


def test_two_joins_of_one_machine_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    host = f"host-{os.getpid()}"
    monkeypatch.setattr(socket, "gethostname", lambda: host)

    with own_name(None) as first, own_name(None) as second, own_name(f"{host}-c") as third:
        assert (first, second, third) == (host, f"{host}.2", f"{host}-c")
        with pytest.raises(Conflict, match=f"lends as {host}-c already: give another --name"):
            own_name(third).__enter__()
    with own_name(None) as again:
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


def node_line(name: str, **given: object) -> dict[str, object]:
    facts = {
        "vram_total_bytes": 1,
        "vram_free_bytes": 1,
        "cached_shards": 0,
        "device": "cpu",
        "state": "alive",
    }
    known = {
        "node_id": f"id of {name}",
        "name": name,
        "state": "alive",
        "payout_address": WORKER.payout_address,
    }
    return known | facts | given


NETWORK = {
    "nodes": [
        node_line("ada", state="paused", why_paused="outside of its hours"),
        node_line("ada", node_id="another ada", state="paused", why_paused="by its owner"),
    ],
    "deployments": [
        {
            "model_id": "m/one", "revision": "r", "state": "running", "epoch": 1, "num_layers": 6,
            "topology": [
                {"node": "ada", "node_id": "id of ada", "actor": "layer:0", "layers": [0, 4]},
                {"node": "ada", "node_id": "another ada", "actor": "layer:1", "layers": [4, 6]},
            ],
        }
    ],
}  # fmt: skip


def test_a_lender_sees_what_runs_here_and_what_was_earned_and_is_asked_seldom() -> None:
    joined: list[None] = []
    with running_ingress() as ingress:
        client = Client(ingress.url, "azu-sk-x")
        ingress.replies |= {
            "GET /v1/network": Reply(NETWORK),
            "GET /v1/earnings": Reply(
                {**EARNED, "address": WORKER.payout_address, "payout_threshold_lamports": 9}
            ),
        }
        shown = Shown(client, [WORKER], lambda: joined.append(None))
        shown.starts("ada", "id of ada")
        line = "ada is paused: outside of its hours; holds 4 layers of m/one; 0.05 HYPE earned, 0.02 paid"
        assert [shown.text(now_s) for now_s in (0, 5, 10)] == [line] * 3
        assert len(ingress.requests) == 2
        ingress.replies.clear()
        assert shown.text(60) == "no route"
    for _ in range(2):
        shown.have_joined()

    assert len(joined) == 1
    assert QUIET.text(0) == ""
    assert told(NetworkResponse.model_validate(NETWORK), {"id of cleo"}) == "holds nothing"


def test_a_lender_is_told_what_the_machine_would_hold_and_could_earn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [{"model_id": "m/one", "layers": 4, "num_layers": 6}]
    with running_ingress() as ingress:
        client = Client(ingress.url)
        ingress.replies["POST /v1/nodes/offer"] = Reply({"pieces": pieces, "lamports_per_day": 1_500_000})
        _show_offer(client, [WORKER], tmp_path)
        ingress.replies["POST /v1/nodes/offer"] = Reply({"pieces": [], "lamports_per_day": 0})
        _show_offer(client, [WORKER, WORKER], tmp_path)
        ingress.replies.clear()
        _show_offer(client, [WORKER], tmp_path)
        asked = ingress.requests[0].body
    output = " ".join(capsys.readouterr().out.split())

    assert asked["vram_bytes"] == 8 * MIB
    assert asked["memory_bytes_per_s"] > 0
    assert "Now this machine would hold 4 of 6 layers of m/one" in output
    assert "could earn 0.015 HYPE a day: what owners got here in the last days for each GiB" in output
    assert "Now each of 2 GPUs would hold nothing: no model runs" in output
    assert "what it could earn is not known" in output
    assert "What this machine would hold is not known: no route" in output


@pytest.mark.parametrize("unasked", [True, False])
def test_earnings_are_claimed_in_the_same_step_where_the_wallet_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unasked: bool
) -> None:
    account = Account.from_key("0x" + "07" * 32)
    wallet = Account.encrypt(account.key, "walk", kdf="pbkdf2", iterations=2)
    (tmp_path / "wallet.json").write_text(json.dumps(wallet))
    (tmp_path / "wallet.json").chmod(0o600)
    monkeypatch.setenv("AZU_WALLET_PASSWORD", "walk")
    with running_ingress() as ingress:
        platform_of(ingress)
        facts = {**EARNED, "address": account.address, "payout_threshold_lamports": 9}
        ingress.replies |= {
            "GET /v1/earnings": Reply(facts),
            "POST /v1/earnings/claim": Reply({"address": account.address, "claimed": True}),
        }
        client = Client(ingress.url, "azu-sk-x")
        _have_claimed(client, account.address, tmp_path, unasked=unasked)
        claims = [one for one in ingress.requests if one.path == "/v1/earnings/claim"]
        told_here = capsys.readouterr().out
        # Another address is paid, and whose earnings are claimed is not asked again.
        _have_claimed(client, WORKER.payout_address, tmp_path, unasked=True)
        told_other = capsys.readouterr().out
        ingress.replies["GET /v1/earnings"] = Reply({**facts, "claimed": True})
        _have_claimed(client, account.address, tmp_path, unasked=True)
        assert capsys.readouterr().out == ""
        assert [one for one in ingress.requests if one.path == "/v1/earnings/claim"] == claims

    assert len(claims) == unasked
    assert ("has claimed its earnings" in told_here) == unasked
    assert ("azu earnings --claim" in told_here) != unasked
    assert "azu earnings --claim" in told_other


def test_the_background_and_the_service_get_the_options_that_were_given() -> None:
    given = {"--vram": "8MiB", "--name": None, "--cpu": True, "--yield": False, "--max-temperature": 80.0}

    assert _options(given) == ["--vram", "8MiB", "--cpu", "--max-temperature", "80.0"]
