"""The capture gets everything that crosses the bridge, so that what it does not show did not cross."""

import secrets
import subprocess
import sys

import pytest

from tests.hosts.capture import captured
from tests.hosts.namespaces import Host, lan

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("namespaces")]

_LISTEN = """
import socket
with socket.create_server(("", 7777)) as server:
    print("ready", flush=True)
    channel, _ = server.accept()
    while channel.recv(65536):
        pass
"""
_SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 7777), timeout=10) as channel:
    channel.sendall(bytes.fromhex(sys.stdin.read()))
"""


def run_on(host: Host, program: str, *arguments: str) -> list[str]:
    return host.command(sys.executable, "-c", program, *arguments)


def test_the_capture_gets_what_one_host_sends_another() -> None:
    sent = secrets.token_bytes(3_000_000)
    with lan(2) as net, captured(net.bridge) as capture:
        there, here = net.hosts
        listening = subprocess.Popen(run_on(there, _LISTEN), stdout=subprocess.PIPE, text=True)
        assert listening.stdout is not None
        assert listening.stdout.readline() == "ready\n"
        sending = subprocess.run(run_on(here, _SEND, there.ip), input=sent.hex(), text=True, timeout=30)
        assert sending.returncode == 0
        assert listening.wait(10) == 0

    assert capture.lost == 0
    assert sent in capture.streams().values()
    assert capture.holds(sent[1_000_000:1_000_100])
    assert not capture.holds(secrets.token_bytes(32))
