"""Several hosts on one machine: network namespaces with a bridge between them. Needs root and iproute2."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace with its own address, which the other hosts and this machine reach."""

    namespace: str
    ip: str

    def command(self, *words: str) -> list[str]:
        """Return a command line that runs another one on this host."""
        return ["ip", "netns", "exec", self.namespace, *words]


@dataclass(frozen=True, slots=True)
class Lan:
    """Hosts around one bridge; this machine sits on it too, at `ip`."""

    bridge: str
    ip: str
    hosts: tuple[Host, ...]


def why_not() -> str | None:
    """Return what this machine lacks for namespaces, None if it lacks nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2: apt-get install iproute2"
    probe = f"azu{os.getpid()}p"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=_TIMEOUT_S)
    if made.returncode:
        return f"this kernel makes no network namespaces: {made.stderr.strip()}"
    _ip("netns", "del", probe)
    return None


@contextmanager
def lan(num_hosts: int) -> Iterator[Lan]:
    """Run a number of hosts until the context is left."""
    tag, subnet = f"azu{os.getpid() % 100_000}", f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
    hosts = tuple(Host(f"{tag}-{index}", f"{subnet}.{index}") for index in range(1, num_hosts + 1))
    with ExitStack() as stack:
        _ip("link", "add", tag, "type", "bridge")
        stack.callback(_ip_if_there, "link", "del", tag)
        _ip("addr", "add", f"{subnet}.254/24", "dev", tag)
        # Promiscuous, so that a capture on the bridge sees what only crosses it.
        _ip("link", "set", tag, "up", "promisc", "on")
        for index, host in enumerate(hosts, start=1):
            _ip("netns", "add", host.namespace)
            stack.callback(_ip_if_there, "netns", "del", host.namespace)
            _plug(host, tag, f"{tag}v{index}")
        yield Lan(tag, f"{subnet}.254", hosts)


def _plug(host: Host, bridge: str, outer: str) -> None:
    inside = ("-n", host.namespace)
    _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("link", "set", outer, "master", bridge, "up")
    _ip(*inside, "link", "set", "lo", "up")
    _ip(*inside, "addr", "add", f"{host.ip}/24", "dev", "eth0")
    _ip(*inside, "link", "set", "eth0", "up")
    _ip(*inside, "route", "add", "default", "via", f"{host.ip.rpartition('.')[0]}.254")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)


def _ip_if_there(*words: Sequence[str]) -> None:
    with suppress(subprocess.CalledProcessError):
        _ip(*map(str, words))
