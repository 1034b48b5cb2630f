"""A bridge with machines on it, without a link to any other network."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.machines.machine import Machine

_TOOLS = ("ip", "setpriv", "unshare", "nsenter", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")


def can_make_machines() -> bool:
    """Return whether this process may make namespaces and has the tools for them."""
    return os.geteuid() == 0 and all(shutil.which(tool) for tool in _TOOLS)


@contextmanager
def lan(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Machine]]:
    """Run machines on one bridge until the block ends; `folder`/key is their SSH key."""
    tag = f"{os.getpid():x}"
    bridge, subnet = f"az{tag}", f"10.{213 + os.getpid() % 40}.{os.getpid() // 40 % 256}"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    public_key = (folder / "key.pub").read_text()
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        machines = {}
        for index, name in enumerate(names):
            namespace, ip = f"az{tag}-{index}", f"{subnet}.{10 + index}"
            _ip("netns", "add", namespace)
            stack.callback(_ip, "netns", "del", namespace)
            _join(bridge, namespace, f"az{tag}v{index}", ip, gateway=f"{subnet}.1")
            machines[name] = Machine(name, ip, namespace, folder / name, public_key)
            stack.callback(machines[name].stop)
        yield machines


def _join(bridge: str, namespace: str, link: str, ip: str, *, gateway: str) -> None:
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("link", "set", link, "master", bridge, "up")
    inside = ("-n", namespace)
    _ip(*inside, "addr", "add", f"{ip}/24", "dev", "eth0")
    _ip(*inside, "link", "set", "eth0", "up")
    _ip(*inside, "link", "set", "lo", "up")
    # Ray looks for the address of the default route, so there is one, though it leads nowhere.
    _ip(*inside, "route", "add", "default", "via", gateway)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
