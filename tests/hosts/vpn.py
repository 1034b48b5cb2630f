"""A VPN in user space, as machines behind NAT use one: a TUN device on each, UDP to a hub that all reach.

It imitates the way of packets through WireGuard with a hub, without its encryption: the kernel of a test
machine may have no WireGuard. As a program it is one machine's end: `python -m tests.hosts.vpn HUB:PORT IP`.
"""

import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from tests.hosts.namespaces import Host, Lan

ROOT = Path(__file__).resolve().parents[2]
TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
# WireGuard's: what is left of an Ethernet frame beside its headers.
_MTU = 1420
_READY = "up"


def main(hub: str, address: str) -> None:
    """Run a machine's end until it is ended."""
    name = f"vpn{os.getpid() % 1_000_000}"
    device = os.open(TUN, os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    for words in (
        ("addr", "add", f"{address}/24", "dev", name),
        ("link", "set", name, "up", "mtu", str(_MTU)),
    ):
        subprocess.run(["ip", *words], check=True, timeout=20)
    host, _, port = hub.partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.connect((host, int(port)))
        link.send(socket.inet_aton(address))  # so that the hub knows where it is
        print(_READY, flush=True)
        while True:
            readable, _, _ = select.select([device, link], [], [])
            if device in readable:
                link.send(os.read(device, 65536))
            if link in readable:
                os.write(device, link.recv(65536))


def _forward(hub: socket.socket) -> None:
    """Send each packet on to the machine that has its address; the socket's end ends it."""
    places: dict[bytes, tuple[str, int]] = {}
    while True:
        try:
            packet, sender = hub.recvfrom(65536)
        except OSError:
            return
        if len(packet) == 4:
            places[packet] = sender
        elif (place := places.get(packet[16:20])) is not None:  # the receiver in an IPv4 header
            hub.sendto(packet, place)


@contextmanager
def vpn(net: Lan) -> Iterator[tuple[Host, ...]]:
    """Yield the hosts at their addresses in a VPN; this machine is its hub, and one of its machines.

    Outside of it no host reaches another one: each reaches this machine alone.
    """
    subnet = f"10.66.{os.getpid() % 250}"
    with ExitStack() as stack:
        for index in range(1, len(net.hosts) + 1):
            isolated = ("link", "set", f"{net.bridge}v{index}", "type", "bridge_slave", "isolated", "on")
            subprocess.run(["ip", *isolated], check=True, timeout=20)
        hub = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        hub.bind((net.ip, 0))
        forwarding = threading.Thread(target=_forward, args=(hub,), daemon=True)
        forwarding.start()
        at = f"{net.ip}:{hub.getsockname()[1]}"
        here: Sequence[str] = (sys.executable, "-m", "tests.hosts.vpn", at, f"{subnet}.254")
        stack.enter_context(_running(here))
        hosts = tuple(replace(one, ip=f"{subnet}.{index}") for index, one in enumerate(net.hosts, start=1))
        for host in hosts:
            words = (sys.executable, "-m", "tests.hosts.vpn", at, host.ip)
            stack.enter_context(_running(host.command(*words)))
        yield hosts


@contextmanager
def _running(words: Sequence[str]) -> Iterator[None]:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == _READY
        yield
    finally:
        process.kill()
        process.wait(20)


if __name__ == "__main__":
    main(*sys.argv[1:])
