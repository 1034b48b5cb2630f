"""A network over several hosts, started as users start it: `azu up` on one, `azu join` on the others."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from eth_account import Account

from azu.client import Client
from azu.client.http import trusting
from azu.launch.admin import new_ticket
from tests.hosts.namespaces import Host

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
OWNER = "0x" + "b0" * 20
ROOT = Path(__file__).resolve().parents[2]
PORT = 8000


@dataclass(slots=True)
class HostedNetwork:
    """A running network; `client` reaches it from outside, without a key."""

    head: Host
    home: Path
    facts: dict[str, str]
    client: Client
    stack: ExitStack = field(repr=False)

    @property
    def is_encrypted(self) -> bool:
        """Whether it was started with TLS."""
        return self.facts["url"].startswith("https://")

    def admin(self) -> Client:
        """Return a client with the admin key."""
        return Client(self.facts["url"], self.facts["admin_key"], tls=trust(self.facts))

    def ticket(self, uses: int = 1) -> str:
        """Return a ticket that is not used yet."""
        if not self.is_encrypted:
            return self.facts["ticket"]
        return new_ticket(self.admin(), label="test", uses=uses, expires_in_s=3600).encode()

    def join(self, host: Host, name: str, ticket: str, vram: str = "8MiB") -> subprocess.Popen[str]:
        """Start `azu join` on a host; it may not have joined yet."""
        options = ("--vram", vram, "--payout", OWNER, "--name", name, "--ip", host.ip, "--cpu")
        return self.stack.enter_context(azu(host, self.home.parent / name, "join", ticket, *options))

    def names(self) -> set[str]:
        """Return the names of the nodes that are alive."""
        return {node.name for node in self.client.network().nodes if node.state == "alive"}

    def ray_token(self) -> str:
        """Return the token that opens the Ray cluster."""
        return (self.home / "ray-token").read_text()


@contextmanager
def hosted(head: Host, folder: Path, *, encrypted: bool) -> Iterator[HostedNetwork]:
    """Run a network without workers on a host, until the context is left."""
    policy = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    file = folder / "network.yaml"
    file.write_text(yaml.safe_dump({"policy": policy["policy"]}))
    options = ("--ip", head.ip, "--network", str(file), "--json")
    options = (*options, "--tls" if encrypted else "--no-tls")
    environment = {} if encrypted else {"AZU_HTTP_HOST": head.ip}
    with ExitStack() as stack:
        up = stack.enter_context(azu(head, folder / "head", "up", *options, **environment))
        assert up.stdout is not None
        said = up.stdout.readline()
        assert said.startswith("{"), said + up.stdout.read()
        facts = json.loads(said)
        client = Client(facts["url"], tls=trust(facts))
        client.login(Account.create())
        yield HostedNetwork(head, folder / "head", facts, client, stack)


def trust(facts: dict[str, str]):
    """Return the TLS context that clients of a network need, from what `azu up` printed."""
    return trusting(facts["authority"]) if facts["authority"] else None


@contextmanager
def azu(host: Host, home: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command of azu's on a host; it is interrupted when the context is left."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    process = subprocess.Popen(
        host.command(sys.executable, "-m", "azu.cli", *arguments),
        env=kept | {"AZU_HOME": str(home), "HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def eventually(condition: Callable[[], object], timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
