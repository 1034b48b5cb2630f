"""A network over several hosts, started as users start it: `azu up` on one, `azu join` on the others."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from eth_account import Account

from azu.client import Client
from azu.client.http import trusting
from azu.client.machine import stored_credential
from azu.files import write_private
from azu.launch.processes import ProcessGroup, ProcessSpec, free_port
from azu.launch.ray_nodes import STARTED, RayHost, Worker, driver_environment
from azu.units import MIB
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

    def on_head(self, *arguments: str) -> Any:
        """Run a command on the head, and return the JSON that it prints."""
        with azu(self.head, self.home, *arguments, "--json") as process:
            said, _ = process.communicate(timeout=START_TIMEOUT_S)
        assert process.returncode == 0, said
        return json.loads(said)

    def ticket(self, host: Host | str, uses: int = 1) -> str:
        """Return a ticket for a host, or for a range of addresses."""
        address = host if isinstance(host, str) else host.ip
        made: dict[str, str] = self.on_head("ticket", "new", "--host", address, "--uses", str(uses))
        return made["ticket"]

    def join(self, host: Host, name: str, ticket: str, vram: str = "8MiB") -> subprocess.Popen[str]:
        """Start `azu join` on a host; it may not have joined yet."""
        options = ("--vram", vram, "--payout", OWNER, "--name", name, "--ip", host.ip, "--cpu")
        return self.stack.enter_context(azu(host, self.home.parent / name, "join", ticket, *options))

    def paying_client(self) -> Client:
        """Return the client of a user who has deposited 5 HYPE, with the commands that users type."""
        self._as_user("wallet", "new")
        self._as_user("wallet", "fund", "10", AZU_TLS_CA=self.facts["authority"])
        client = self.logged_in()
        # From here on the id alone says which network it is.
        self._as_user("deposit", "5")
        return client

    def logged_in(self) -> Client:
        """Return a client of that user with a new key."""
        url = self.facts["url"]
        assert "not checked" not in self._as_user("login", f"{url}#{self.facts['network_id']}")
        known = stored_credential(self._user_home, url)
        assert known is not None
        return Client(url, known.api_key, tls=trust(self.facts))

    @property
    def _user_home(self) -> Path:
        return self.home.parent / "user"

    def _as_user(self, *words: str, **given: str) -> str:
        environment = {"AZU_WALLET_PASSWORD": "hosts", "AZU_URL": self.facts["url"], **given}
        with azu(self.head, self._user_home, *words, **environment) as process:
            said, _ = process.communicate(timeout=START_TIMEOUT_S)
        assert process.returncode == 0, said
        return said

    def names(self) -> set[str]:
        """Return the names of the nodes that are alive."""
        return {node.name for node in self.client.network().nodes if node.state == "alive"}

    def ray_token(self) -> str:
        """Return the token that opens the Ray cluster."""
        return (self.home / "ray-token").read_text()


@contextmanager
def hosted(
    head: Host, folder: Path, *options: str, node_life_s: float | None = None
) -> Iterator[HostedNetwork]:
    """Run a network without workers on a host, until the context is left; `options` are those of `azu up`."""
    policy = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["policy"]
    # Jobs wait for hosts as long as a test takes.
    policy["requeue"] = policy.get("requeue", {}) | {"budget_s": 900}
    if node_life_s is not None:
        policy["certificates"] = {"node_s": node_life_s}
    file = folder / "network.yaml"
    file.write_text(yaml.safe_dump({"policy": policy}))
    options = ("--ip", head.ip, "--trust-members", "--network", str(file), "--json", *options)
    with ExitStack() as stack:
        up = stack.enter_context(azu(head, folder / "head", "up", *options))
        yield _running(up, head, folder / "head", stack)


@contextmanager
def foreign(head: Host, lenders: Sequence[tuple[str, Host]], folder: Path) -> Iterator[HostedNetwork]:
    """Run a network on a Ray cluster of several hosts that azu did not start, and that is not encrypted."""
    home, port = folder / "head", free_port()
    write_private(home / "ray-token", secrets.token_hex(32))
    with ProcessGroup(folder / "logs") as nodes, ExitStack() as stack:
        rays = {
            host: RayHost(folder / f"ray-{index}", home / "ray-token", host.ip)
            for index, host in enumerate((head, *(host for _, host in lenders)))
        }
        specs = [(head, rays[head].head(port))]
        specs += [
            (host, rays[host].worker(f"{head.ip}:{port}", Worker(index, name, 8 * MIB, OWNER)))
            for index, (name, host) in enumerate(lenders)
        ]
        for host, spec in specs:
            arguments = tuple(host.command(*spec.arguments))
            nodes.start(ProcessSpec(spec.name, arguments, spec.environment))
        for _, spec in specs:
            nodes.wait_until_printed(spec.name, STARTED, START_TIMEOUT_S)
        options = (
            "--address",
            f"{head.ip}:{port}",
            "--network",
            str(ROOT / "configs" / "demo.yaml"),
            "--json",
        )
        environment = driver_environment(home / "ray-token", ip=head.ip) | {"AZU_HTTP_HOST": head.ip}
        serve = stack.enter_context(azu(head, home, "serve", *options, **environment))
        yield _running(serve, head, home, stack)


def _running(process: subprocess.Popen[str], head: Host, home: Path, stack: ExitStack) -> HostedNetwork:
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("{"), said + process.stdout.read()
    facts = json.loads(said)
    client = Client(facts["url"], tls=trust(facts))
    client.login(Account.create())
    return HostedNetwork(head, home, facts, client, stack)


def trust(facts: dict[str, str]):
    """Return the TLS context that clients of a network need, from what `azu up` printed."""
    return trusting(facts["authority"]) if facts.get("authority") else None


@contextmanager
def azu(host: Host, home: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command of azu's on a host; it is interrupted when the context is left."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    process = subprocess.Popen(
        host.command(sys.executable, "-m", "azu.cli", *arguments),
        env=kept | {"AZU_HOME": str(home), "HF_HUB_OFFLINE": "1", "AZU_ONE_USER": "1"} | environment,
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
