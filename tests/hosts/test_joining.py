"""Which nodes may join an encrypted network of several hosts."""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from azu.errors import Forbidden
from azu.files import write_private
from azu.launch.membership import EnrolledMembership, EnrolmentTicket, TlsFiles, decode_ticket, head_files
from azu.launch.processes import ProcessGroup, ProcessSpec
from azu.launch.ray_nodes import RayHost, Worker
from azu.units import MIB
from tests.hosts.namespaces import Host, lan
from tests.hosts.network import OWNER, START_TIMEOUT_S, azu, eventually, hosted

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("namespaces")]

# Nodes that are admitted have joined long before.
REFUSED_FOR_S = 45.0
LENT = ("--vram", "8MiB", "--payout", OWNER, "--cpu")


@dataclass(frozen=True, slots=True)
class Attempt:
    """A Ray node that tries to join, with a certificate and a token."""

    name: str
    tls: TlsFiles | None
    token: str


def strange_files(folder: Path, ip: str, *, true_authority: Path) -> TlsFiles:
    """Return a certificate of another authority, beside the network's own authority certificate."""
    files = head_files(folder, [ip]).ray
    files.authority.write_bytes(true_authority.read_bytes())
    return files


def try_to_join(nodes: ProcessGroup, host: Host, folder: Path, head: str, attempt: Attempt) -> None:
    """Start a Ray node on a host, as `azu join` does once it has access."""
    home = folder / attempt.name
    ray = RayHost(home, home / "token", host.ip, tls=attempt.tls)
    write_private(ray.token_path, attempt.token)
    command = ray.worker(head, Worker(0, attempt.name, 4 * MIB, OWNER))
    nodes.start(ProcessSpec(attempt.name, tuple(host.command(*command.arguments)), command.environment))


def test_a_node_without_a_certificate_or_the_token_does_not_join(folder: Path) -> None:
    with lan(2) as net, hosted(net.hosts[0], folder) as network:
        host, token = net.hosts[1], network.ray_token()
        opened = decode_ticket(network.ticket(host))
        assert isinstance(opened, EnrolmentTicket)
        access = EnrolledMembership(opened, folder / "good", name="good", host=host.ip).access()
        assert access.tls is not None
        strange = strange_files(folder / "strange", host.ip, true_authority=access.tls.authority)
        refused = (
            Attempt("no-cert", None, token),
            Attempt("odd-cert", strange, token),
            Attempt("odd-token", access.tls, "ab" * 32),
        )
        with ProcessGroup(folder / "logs") as nodes:
            for attempt in refused:
                try_to_join(nodes, host, folder, access.head, attempt)
            time.sleep(REFUSED_FOR_S)
            assert network.names() == set()
            # Only certificate and token differ: with both the same node joins.
            try_to_join(nodes, host, folder, access.head, Attempt("good", access.tls, token))
            eventually(lambda: network.names() == {"good"})
        names = ", ".join(attempt.name for attempt in refused)
        print(f"\nnot let in for {REFUSED_FOR_S:.0f} s: {names}; let in: good")


def test_a_ticket_that_is_used_up_or_revoked_or_for_another_host_admits_no_node(folder: Path) -> None:
    with lan(3) as net, hosted(net.hosts[0], folder) as network:
        head, first, second = net.hosts
        network_of_head = f"{head.ip.rpartition('.')[0]}.0/24"
        ticket = network.ticket(network_of_head)
        joined = network.join(first, "ada", ticket)
        eventually(lambda: network.names() == {"ada"})

        assert "used up" in refusal(network.join(second, "ben", ticket))
        assert "this ticket is for" in refusal(network.join(second, "ben", network.ticket(first)))

        revoked = network.ticket(second)
        *_, latest = network.on_head("ticket", "list")
        network.on_head("ticket", "revoke", latest["ticket_id"])
        assert "revoked" in refusal(network.join(second, "cleo", revoked))

        # A node that had joined does not join again once its ticket is revoked.
        tickets = network.on_head("ticket", "list")
        (line,) = (one for one in tickets if [node["name"] for node in one["nodes"].values()] == ["ada"])
        network.on_head("ticket", "revoke", line["ticket_id"])
        for process in psutil.Process(joined.pid).children(recursive=True):
            if process.name() == "raylet":
                process.kill()
        assert "revoked" in refusal(joined)
        eventually(lambda: network.names() == set())
    print("\nrefused: a ticket used up, for another host, revoked, and a node whose ticket was revoked since")


def test_no_host_gets_a_certificate_for_the_heads_address(folder: Path) -> None:
    with lan(2) as net, hosted(net.hosts[0], folder) as network:
        opened = decode_ticket(network.ticket("0.0.0.0/0", uses=5))
        assert isinstance(opened, EnrolmentTicket)
        for address in (network.head.ip, "127.0.0.1"):
            pretender = EnrolledMembership(opened, folder / "pretender", name="head", host=address)
            with pytest.raises(Forbidden):
                pretender.access()


def test_a_network_without_encryption_is_joined_on_its_own_host_alone(folder: Path) -> None:
    with lan(2) as net:
        here, there = net.hosts
        with azu(here, folder / "head", "up", "--workers", "1", "--vram", "8MiB", "--json") as up:
            assert up.stdout is not None
            facts = json.loads(up.stdout.readline())
            with azu(there, folder / "far", "join", facts["ticket"], *LENT) as far:
                assert "for the head's own machine" in " ".join(refusal(far).split())
            # What Ray's processes listen at is not even reached from there.
            listening = subprocess.run(
                here.command("ss", "-ltnH"), capture_output=True, text=True, check=True
            )
            outside = [line.split()[3] for line in listening.stdout.splitlines() if "127.0.0.1" not in line]
            assert outside == []
            near_home = folder / "near"
            with azu(here, near_home, "join", facts["ticket"], *LENT) as near:
                assert near.stdout is not None
                assert "lends 8.0 MiB" in next(line for line in near.stdout if "lends" in line)


def test_without_trust_in_members_there_are_no_tickets(folder: Path) -> None:
    with lan(1) as net, azu(net.hosts[0], folder / "head", "up", "--ip", net.hosts[0].ip, "--json") as up:
        assert up.stdout is not None
        facts = json.loads(up.stdout.readline())
        assert facts["ticket"] is None
        assert "one Unix user" in facts["no_ticket"]
        with azu(net.hosts[0], folder / "head", "ticket", "new", "--host", "10.0.0.7") as ticket:
            assert "one Unix user" in " ".join(refusal(ticket).split())
        with azu(net.hosts[0], folder / "head", "doctor", "--json") as doctor:
            found = json.loads(refusal(doctor))
    (finding,) = (one for one in found["network"] if one["about"] == "Unix users")
    assert finding["state"] == "bad"


def refusal(joining: subprocess.Popen[str]) -> str:
    """Return what a command printed that ended with an error."""
    said, _ = joining.communicate(timeout=START_TIMEOUT_S)
    assert joining.returncode == 1, said
    return said
