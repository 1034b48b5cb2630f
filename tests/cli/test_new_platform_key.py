"""The commands of docs/operations.md, A new key of the platform, run as they are written."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from eth_account import Account

from azu.client import Client
from azu.devnet.chain import USDC
from azu.launch.local_network import DEMO
from azu.launch.processes import free_port
from azu.money.chain.wallet import transfer_hype
from tests.money.chain.running import RunningDevnet, running_devnet

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
HYPE = 10**8
TIMEOUT_S = 500


def runbook() -> list[str]:
    """Return the lines of the section's block."""
    section = PAGE.read_text().partition("## A new key of the platform\n")[2].partition("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


class Head:
    """A head whose chain runs apart from its network, and a shell there."""

    def __init__(self, home: Path, devnet: RunningDevnet) -> None:
        self.old = Account.create()
        key = home / "old.key"
        key.write_text(self.old.key.hex())
        key.chmod(0o600)
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
        self.environment = kept | {
            "AZU_HOME": str(home / "azu"),
            "AZU_HTTP_PORT": str(free_port()),
            "AZU_NETWORK": str(DEMO),
            "AZU_ONE_USER": "1",
            "AZU_PRIVATE_KEY_FILE": str(key),
            "AZU_ADMIN_ADDRESSES": "0x" + "ad" * 20,
            "HYPERLIQUID_RPC_URL": devnet.url,
            "HYPERLIQUID_ADDRESS": self.old.address,
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def type(self, *lines: str) -> str:
        """Return what lines print that are typed into one shell, each of which has to succeed."""
        done = subprocess.run(
            ["bash", "-ec", "\n".join(lines)],
            cwd=self.home, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture
def head() -> Iterator[tuple[Head, RunningDevnet]]:
    with (
        tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        running_devnet() as devnet,
    ):
        head = Head(Path(folder), devnet)
        devnet.fund(head.old.address, 10**9, token=USDC.full_id)
        try:
            yield head, devnet
        finally:
            if (Path(folder) / "azu" / "network.json").exists():
                head.type("azu down")


def test_the_key_is_replaced_by_the_commands_as_they_are_written(head: tuple[Head, RunningDevnet]) -> None:
    owner, devnet = head
    owner.type("azu up --background")
    url, user = f"http://127.0.0.1:{owner.environment['AZU_HTTP_PORT']}", Account.create()
    devnet.fund(user.address, 10 * HYPE)
    client = Client(url, "")
    client.login(user)
    before = transfer_hype(user, owner.old.address, HYPE, chain_url=devnet.url)
    assert client.deposit(before, user.address).lamports == HYPE

    printed = owner.type(*runbook())

    assert "books and chain agree" in " ".join(printed.lower().split())
    [record] = json.loads((owner.home / "azu" / "platforms.json").read_text())
    assert record["old"] == owner.old.address.lower()
    shown = client.platform()
    assert shown.address.lower() == record["new"]
    assert client.balance().available_lamports == HYPE
    # What comes to the old address is credited, and moved beside the network; the new address sends it back.
    late = transfer_hype(user, owner.old.address, HYPE // 2, chain_url=devnet.url)
    assert client.deposit(late, user.address).lamports == HYPE // 2
    [key] = owner.home.glob("platform-*.key")
    again = f'azu treasury rotate "$AZU_PRIVATE_KEY_FILE" "{key}"'
    assert "0.5 HYPE moved" in " ".join(owner.type(again).split())
    asked = client.withdraw(user, HYPE)
    deadline_s = time.monotonic() + 60
    while (state := client.withdrawal(asked.nonce).state) != "paid":
        assert state in ("waiting", "sending")
        assert time.monotonic() < deadline_s, state
        time.sleep(0.2)
    rows = devnet.info("userNonFundingLedgerUpdates", user.address.lower(), startTime=0)
    assert [row["delta"]["amount"] for row in rows if row["delta"].get("user") == record["new"]] == ["1.0"]

    # The same lines once more replace the new key by another, and keep its file.
    devnet.fund(record["new"], 10**9, token=USDC.full_id)
    owner.environment |= {"AZU_PRIVATE_KEY_FILE": str(key), "HYPERLIQUID_ADDRESS": record["new"]}
    live = key.read_text()
    printed = owner.type(*runbook())
    assert "books and chain agree" in " ".join(printed.lower().split())
    assert key.read_text() == live
    assert len(list(owner.home.glob("platform-*.key"))) == 2
    first, second = json.loads((owner.home / "azu" / "platforms.json").read_text())
    assert (first, second["old"]) == (record, record["new"])
    assert client.platform().address.lower() == second["new"]
