"""A real network with a Unix user for money and one for Ray, and a hostile member that joined it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.config import Settings, load_network
from azu.launch.local_network import DEMO, LocalNetwork, local_network
from azu.launch.membership import TlsFiles, membership_of
from azu.launch.network_users import shared_file
from azu.launch.processes import free_port
from azu.launch.ray_nodes import driver_environment
from azu.launch.unix_users import UnixUser
from tests.hosts.namespaces import Host, lan, why_not
from tests.unix_users import MONEY, RAY, users_of_tests

HONEST_WALLET: LocalAccount = Account.from_key("0x" + "a1" * 32)
MALLORY_WALLET: LocalAccount = Account.from_key("0x" + "bad0" * 16)
HONEST, MALLORY = (wallet.address.lower() for wallet in (HONEST_WALLET, MALLORY_WALLET))
# So little that a layer has experts on several nodes, whichever node is measured as the fastest.
HONEST_VRAM, MALLORYS_VRAM = "4MiB", "3MiB"
# Longer than any test takes.
_MATURE_S = 86_400
_START_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Attacked:
    """A network under attack: `act` runs a function of tests/redteam/code.py where the member says."""

    network: LocalNetwork
    home: Path
    user_homes: Path
    _member: subprocess.Popen[str] = field(repr=False)

    def act(self, where: str, function: str, *arguments: Any) -> Any:
        """Have the member run its code in the "ingress", another actor of azu, or as a task of the "head"."""
        assert self._member.stdin is not None
        assert self._member.stdout is not None
        self._member.stdin.write(json.dumps([where, function, arguments]) + "\n")
        self._member.stdin.flush()
        answer = json.loads(self._member.stdout.readline())
        assert not (isinstance(answer, dict) and "failed" in answer), answer
        return answer

    @property
    def money_home(self) -> Path:
        """AZU_HOME of the processes of money."""
        return self.home / "users" / "money"

    def ports_of(self, name: str) -> set[int]:
        """Return the ports at which a Unix user's processes listen."""
        connections = (
            one for pid in self.processes_of(name) for one in psutil.Process(pid).net_connections("tcp")
        )
        return {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}

    def processes_of(self, name: str) -> list[int]:
        """Return the ids of the processes of a Unix user."""
        user = UnixUser.find(name)
        assert user is not None
        found = []
        for one in psutil.process_iter():
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                if one.uids().real == user.uid:
                    found.append(one.pid)
        return found


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    with (
        users_of_tests(tmp_path_factory.mktemp("view")),
        pytest.MonkeyPatch.context() as environment,
        tempfile.TemporaryDirectory(prefix="azu-", dir="/var/tmp", ignore_cleanup_errors=True) as name,
        ExitStack() as stack,
    ):
        net = stack.enter_context(lan(1))
        ip, (host,) = net.ip, net.hosts
        environment.setenv("HF_HUB_OFFLINE", "1")
        folder = Path(name)
        folder.chmod(0o711)
        network_file = folder / "network.yaml"
        network_file.write_text(yaml.safe_dump(_network_file()))
        settings = Settings.from_environment().model_copy(
            update={
                "home": folder / "head",
                "network": network_file,
                "http_host": ip,
                "http_port": free_port(),
                "domain": None,
                "chain_url": None,
                "redis_host": None,
                "money_user": MONEY,
                "ray_user": RAY,
                "user_homes": folder / "homes",
            }
        )
        file = load_network(network_file)
        network = stack.enter_context(local_network(settings, file, print, ip=ip))
        assert network.why_one_user == ""
        stack.enter_context(_joined(network, folder, host))
        member = stack.enter_context(_member(network, folder, host))
        yield Attacked(network, settings.home, settings.user_homes, member)


def _network_file() -> dict[str, Any]:
    """Return the demo's network file, in which earnings wait, and each lamport is paid."""
    content = yaml.safe_load(DEMO.read_text())
    content["policy"] |= {"earnings_mature_s": _MATURE_S, "payout_threshold_lamports": 1}
    content["workers"] = [
        {"name": f"honest-{number}", "vram": HONEST_VRAM, "payout": HONEST} for number in range(2)
    ]
    return content


@contextmanager
def _joined(network: LocalNetwork, folder: Path, host: Host) -> Iterator[None]:
    """Run `azu join` as the hostile member's machine does."""
    options = ("--vram", MALLORYS_VRAM, "--payout", MALLORY, "--name", "mallory", "--ip", host.ip, "--cpu")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    environment = kept | {
        "AZU_HOME": str(folder / "mallory"),
        "AZU_USER_HOMES": str(folder / "homes"),
        "AZU_RAY_USER": RAY,
    }
    assert network.ticket is not None
    command = host.command(sys.executable, "-m", "azu.cli", "join", network.ticket.encode(), *options)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while "mallory lends" not in (line := process.stdout.readline()):
            assert line, "it ended"
            assert time.monotonic() < deadline
        yield
    finally:
        _stop(process)


@contextmanager
def _member(network: LocalNetwork, folder: Path, host: Host) -> Iterator[subprocess.Popen[str]]:
    """Run the member's own program, with nothing but what its machine has."""
    membership = membership_of(network.ticket, folder / "mallory", name="mallory", host=host.ip)
    access = membership.access()
    user = UnixUser.find(RAY)
    assert user is not None
    assert access.tls is not None
    files = folder / "mallorys"
    of_tls = (access.tls.certificate, access.tls.key, access.tls.authority)
    tls = TlsFiles(*(shared_file(files, path.name, path.read_text(), user) for path in of_tls))
    token = shared_file(files, "token", access.token, user)
    # Only root enters the member's host; its program runs there as another user.
    as_user = ("setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups", "--")
    process = subprocess.Popen(
        host.command(*as_user, sys.executable, "-m", "tests.redteam.member", access.head),
        # The program is one of the tests, which are not installed.
        env=user.environment(os.environ)
        | driver_environment(token, tls, host.ip)
        | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline()) == "in"
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
