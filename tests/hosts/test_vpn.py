"""Machines that reach each other through a VPN alone are nodes of one network, as behind NAT."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts.namespaces import lan
from tests.hosts.network import eventually, hosted
from tests.hosts.vpn import TUN, vpn

pytestmark = [
    pytest.mark.prove,
    pytest.mark.usefixtures("namespaces"),
    pytest.mark.skipif(not os.access(TUN, os.W_OK), reason="this machine has no /dev/net/tun"),
]
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"


def test_a_network_runs_over_a_vpn_whose_machines_reach_each_other_in_no_other_way(folder: Path) -> None:
    with lan(3) as net, vpn(net) as (head, *lenders), hosted(head, folder) as network:
        direct = lenders[0].command(sys.executable, "-c", CONNECT, net.hosts[0].ip, "8000")
        assert subprocess.run(direct, capture_output=True, timeout=60).returncode != 0

        for name, host in zip(("ada", "ben"), lenders, strict=True):
            network.join(host, name, network.ticket(host))
        eventually(lambda: network.names() == {"ada", "ben"})
        client = network.paying_client()
        answer = client.generate("The capital of France is", model="azu/tiny-dense", max_tokens=8)
        assert answer.receipt.completion_tokens == answer.received_tokens == 8
        (model,) = client.network().deployments
        assert {piece.node for piece in model.topology} <= {"ada", "ben"}
