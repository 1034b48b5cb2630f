"""A head is lost while it works: a copy that was made before, under load, is restored and pays again."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from azu.client import Client
from azu.devnet.faucet import fund
from azu.errors import AzuError
from azu.launch.processes import free_port
from azu.money.chain.wallet import transfer_hype
from azu.units import LAMPORTS_PER_HYPE
from tests.network.user import User, log_in

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240.0
UP = ("up", "--workers", "2", "--vram", "512MiB", "--json")


def runbook(heading: str) -> list[str]:
    """Return the commands of a part of docs/operations.md, in their order, without arguments of one's own."""
    page = (ROOT / "docs" / "operations.md").read_text()
    part = page[page.index(f"\n## {heading}\n") :].split("\n## ", 2)[1]
    return re.findall(r"`(azu (?:ledger|up|treasury)[^`]*)`", part)


class Home:
    """Runs azu's commands on one AZU_HOME."""

    def __init__(self, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
        own = {"AZU_HOME": str(folder), "AZU_HTTP_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
        self.folder, self._environment = folder, kept | own

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            (sys.executable, "-m", "azu.cli", *arguments),
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> Any:
        """Run a command, which has to succeed, and return the JSON that it prints."""
        process = self.start(*arguments, "--json")
        said, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, said
        return json.loads(said)

    @contextmanager
    def up(self) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
        process = self.start(*UP)
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def paying_user(facts: dict[str, str]) -> User:
    user = log_in(facts["url"], "drill")
    fund(facts["chain_url"], user.address, 2 * LAMPORTS_PER_HYPE)
    deposited = transfer_hype(
        user.account, facts["platform_address"], LAMPORTS_PER_HYPE, chain_url=facts["chain_url"]
    )
    body = {"tx_sig": deposited, "user_address": user.address}
    user.http.post("/deposit", json=body).raise_for_status()
    return user


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Load(threading.Thread):
    """Sends one prompt after the other until the network is gone."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True)
        self._client = client
        self.answers = 0

    def run(self) -> None:
        with suppress(AzuError, httpx.HTTPError):
            while True:
                self._client.generate("Hello", model="azu/tiny-dense", max_tokens=8, ignore_eos=True)
                self.answers += 1


def test_a_lost_head_is_restored_from_a_copy_that_was_made_under_load() -> None:
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as made:
        copy, lost, bare = Path(made) / "copy.tar.gz", Home(Path(made) / "lost"), Home(Path(made) / "bare")
        with lost.up() as (process, facts):
            user = paying_user(facts)
            load = Load(Client(facts["url"], user.api_key))
            load.start()
            eventually(lambda: load.answers >= 5)

            started_s = time.monotonic()
            backup = lost.run("ledger", "backup", str(copy))
            copied_s = time.monotonic() - started_s

            at_copy = load.answers
            eventually(lambda: load.answers >= at_copy + 5)
            before = lost.run("ledger", "audit")
            process.kill()
            process.wait(60)
            load.join(60)

        started_s = time.monotonic()
        bare.run("ledger", "restore", str(copy))
        restored_s = time.monotonic() - started_s
        with bare.up() as (_, facts):
            after = bare.run("ledger", "audit")
            audited_s = time.monotonic() - started_s
            status = bare.run("treasury", "status")
            client = Client(facts["url"], user.api_key)  # the key is in the books
            balance = client.balance().available_lamports
            paid = client.withdraw(user.account, LAMPORTS_PER_HYPE // 4)
            eventually(lambda: client.withdrawal(paid.nonce).state == "paid")
            paid_s = time.monotonic() - started_s
            assert client.generate("Hello", model="azu/tiny-dense", max_tokens=8).text

        assert after["findings"] == []
        assert not status["is_red"]
        assert 0 < after["entries"] < before["entries"]
        assert 0 < balance < LAMPORTS_PER_HYPE
        print(
            f"\na copy of {backup['bytes']:,} bytes took {copied_s:.1f} s under load; lost with the head: "
            f"{before['entries'] - after['entries']} of {before['entries']} entries, those after the copy; "
            f"restored after {restored_s:.1f} s, audited after {audited_s:.0f} s, a withdrawal paid after "
            f"{paid_s:.0f} s"
        )


def test_the_runbook_names_the_commands_that_were_run_in_their_order() -> None:
    assert runbook("Backup") == [
        "azu ledger backup FILE",
        "azu ledger restore FILE",
        "azu up",
        "azu treasury status",
        "azu ledger audit",
    ]
