"""Which nodes may join an encrypted network of several hosts."""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from azu.files import write_private
from azu.launch.membership import EnrolledMembership, EnrolmentTicket, TlsFiles, decode_ticket, head_files
from azu.launch.processes import ProcessGroup, ProcessSpec
from azu.launch.ray_nodes import RayHost, Worker
from azu.units import MIB
from tests.hosts.namespaces import Host, lan
from tests.hosts.network import OWNER, START_TIMEOUT_S, eventually, hosted

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("namespaces")]

# Nodes that are admitted have joined long before.
REFUSED_FOR_S = 45.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """A Ray node that tries to join, with a certificate and a token."""

    name: str
    tls: TlsFiles | None
    token: str


def strange_files(folder: Path, ip: str, *, true_authority: Path) -> TlsFiles:
    """Return a certificate of another authority, beside the network's own authority certificate."""
    files = head_files(folder, [ip])
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
    with lan(2) as net, hosted(net.hosts[0], folder, encrypted=True) as network:
        host, token = net.hosts[1], network.ray_token()
        opened = decode_ticket(network.ticket())
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


def test_a_ticket_that_is_used_up_or_revoked_admits_no_node(folder: Path) -> None:
    with lan(3) as net, hosted(net.hosts[0], folder, encrypted=True) as network:
        _, first, second = net.hosts
        ticket = network.ticket()
        joined = network.join(first, "ada", ticket)
        eventually(lambda: network.names() == {"ada"})

        assert "used up" in refusal(network.join(second, "ben", ticket))

        revoked = network.ticket()
        admin = network.admin()
        admin.revoke_ticket(admin.tickets()[-1].ticket_id)
        assert "revoked" in refusal(network.join(second, "cleo", revoked))

        # A node that had joined does not join again once its ticket is revoked.
        (line,) = (line for line in admin.tickets() if line.nodes == ("ada",))
        admin.revoke_ticket(line.ticket_id)
        for process in psutil.Process(joined.pid).children(recursive=True):
            if process.name() == "raylet":
                process.kill()
        assert "revoked" in refusal(joined)
        eventually(lambda: network.names() == set())
    print("\nrefused: a ticket used up, a ticket revoked, a node whose ticket was revoked since")


def refusal(joining: subprocess.Popen[str]) -> str:
    """Return the error with which `azu join` ended."""
    said, _ = joining.communicate(timeout=START_TIMEOUT_S)
    assert joining.returncode == 1, said
    return said
