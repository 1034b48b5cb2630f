"""A network from the command line: up, joined, left and down, with nothing left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from eth_account import Account

from azu.client import Client
from azu.launch.processes import free_port, session_members

pytestmark = pytest.mark.prove

OWNER = "0x" + "b0" * 20
START_TIMEOUT_S = 400.0
# Of /proc/net/tcp: the state of a socket that listens, and the loopback's addresses.
LISTENS = "0A"
LOOPBACKS = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
# What a later start of a network prints as the first one did.
KEPT = ("url", "ticket", "admin_key", "network_id", "platform_address")


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def azu() -> Iterator[Start]:
    """Start azu's commands; none of them outlives the test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    started = []

    def start(home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "azu.cli", *arguments],
            env=kept | {"AZU_HOME": str(home)} | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        # The kernel ends what it started.
        process.kill()
        process.wait(10)


def eventually(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def sessions_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the sessions that a process started: everything that it can leave behind."""
    return [child.pid for child in psutil.Process(process.pid).children()]


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def read(kind: str) -> list[str]:
    return Path(f"/proc/net/{kind}").read_text().splitlines()


def listening(pid: int) -> set[str]:
    """Return the addresses at which a process takes connections, in the kernel's hexadecimal."""
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            inodes |= set(re.findall(r"^socket:\[(\d+)\]$", str(file.readlink())))
    lines = [line.split() for kind in ("tcp", "tcp6") for line in read(kind)]
    return {line[1].partition(":")[0] for line in lines if line[3] == LISTENS and line[9] in inodes}


def test_a_network_is_up_joined_left_and_down(azu: Start, home: Path) -> None:
    up = azu(home, "up", "--workers", "1", "--vram", "512MiB", "--json", AZU_HTTP_PORT=str(free_port()))
    assert up.stdout is not None
    facts = json.loads(up.stdout.readline())
    sessions = sessions_of(up)
    client = Client(facts["url"])
    client.login(Account.create())

    def alive() -> dict[str, str]:
        return {node.name: node.node_id for node in client.network().nodes if node.state == "alive"}

    eventually(lambda: set(alive()) == {"worker-0"}, 60)
    processes = [pid for session in sessions for pid in session_members(session)]
    assert set().union(*map(listening, processes)) <= LOOPBACKS
    assert httpx.get(facts["dashboard_url"], timeout=30).status_code == 200

    joined = azu(
        home / "joined", "join", facts["ticket"], "--vram", "8MiB", "--payout", OWNER, "--name", "ada"
    )
    eventually(lambda: set(alive()) == {"worker-0", "ada"}, START_TIMEOUT_S)
    (node,) = (node for node in client.network().nodes if node.name == "ada")
    assert (node.payout_address, node.vram_total_bytes) == (OWNER, 8 * 1024**2)

    # `azu ps` may show the dead node, no node or its successor, which has another id.
    raylets = [p for p in psutil.Process(joined.pid).children(recursive=True) if p.name() == "raylet"]
    raylets[0].kill()
    eventually(lambda: alive().get("ada", node.node_id) != node.node_id, START_TIMEOUT_S)

    sessions += sessions_of(joined)
    joined.send_signal(signal.SIGINT)
    assert joined.wait(60) == 130
    eventually(lambda: set(alive()) == {"worker-0"}, 60)

    assert azu(home, "down", "--drain-only").wait(120) == 0
    assert set(alive()) == {"worker-0"}, "nothing is stopped"
    assert azu(home, "down", "--drain").wait(120) == 0
    assert up.wait(60) == 130
    assert [session_members(session) for session in sessions] == [[] for _ in sessions]


def test_a_network_that_is_killed_leaves_nothing_behind_and_starts_again(azu: Start, home: Path) -> None:
    up = azu(home, "up", "--json", AZU_HTTP_PORT=str(free_port()))
    assert up.stdout is not None
    assert json.loads(up.stdout.readline())["ticket"]
    sessions = sessions_of(up)

    up.kill()
    up.wait(10)

    # Ray's agents try for a minute to report to the dead head.
    eventually(lambda: not any(session_members(session) for session in sessions), 120)
    again = azu(home, "up", "--json", AZU_HTTP_PORT=str(free_port()))
    assert again.stdout is not None
    assert json.loads(again.stdout.readline())["ticket"]
    again.send_signal(signal.SIGTERM)
    assert again.wait(60) == 130


def test_networks_share_no_port_and_a_join_goes_on_until_it_is_revoked(azu: Start, home: Path) -> None:
    port = {"AZU_HTTP_PORT": str(free_port())}
    up = azu(home, "up", "--json", **port)
    assert up.stdout is not None
    facts = json.loads(up.stdout.readline())

    second = azu(home / "second", "up", "--json", **port)
    assert second.wait(60) == 1
    assert second.stdout is not None
    assert "is taken by another network of azu" in json.loads(second.stdout.read())["error"]["message"]

    lends = (facts["ticket"], "--vram", "8MiB", "--payout", OWNER, "--name", "ada")
    joined = azu(home / "joined", "join", *lends)
    client = Client(facts["url"])
    client.login(Account.create())

    def lent() -> bool:
        return [node.name for node in client.network().nodes if node.state == "alive"] == ["ada"]

    eventually(lent, START_TIMEOUT_S)
    assert azu(home, "down").wait(120) == 0
    again = azu(home, "up", "--json", **port)
    assert again.stdout is not None
    later = json.loads(again.stdout.readline())
    assert "url" in later, later
    assert [later[name] for name in KEPT] == [facts[name] for name in KEPT]
    eventually(lent, START_TIMEOUT_S)

    assert azu(home, "ticket", "revoke", "local").wait(60) == 0
    assert azu(home, "down").wait(120) == 0
    last = azu(home, "up", "--json", **port)
    assert last.stdout is not None
    later = json.loads(last.stdout.readline())
    assert later["ticket"] != facts["ticket"]
    assert later["admin_key"] == facts["admin_key"]
    assert joined.wait(START_TIMEOUT_S) == 1
    assert azu(home, "join", *lends).wait(60) == 1
