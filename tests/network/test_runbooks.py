"""The runbooks of docs/operations.md run as they stand there: each command, in its order, on a network."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from azu.launch.processes import free_port, own_addresses

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0
ADMIN_KEY = "azu-admin-runbooks"
# On a network that works; the lost head comes last, and in another home.
ORDER = (
    "A bad node",
    "Payouts that do not go",
    "A key that leaked",
    "A full disk",
    "A store that does not start",
    "A lost head",
)


def runbooks() -> dict[str, list[str]]:
    """Return the commands of each runbook."""
    page = (ROOT / "docs" / "operations.md").read_text()
    part = page.split("\n## Runbooks\n")[1].split("\n## ")[0]
    titles = re.split(r"^### (.*)$", part, flags=re.M)[1:]
    return {
        title: re.findall(r"^    (.*)$", text, re.M)
        for title, text in zip(titles[::2], titles[1::2], strict=True)
    }


class Operator:
    """Types commands in a shell, with azu's own program and one AZU_HOME."""

    def __init__(self, folder: Path, options: str) -> None:
        program = folder / "bin" / "azu"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m azu.cli "$@"\n')
        program.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
        self.environment = kept | {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "AZU_HOME": str(folder / "head"),
            "AZU_HTTP_PORT": str(free_port()),
            "AZU_ADMIN_KEY": ADMIN_KEY,
            "AZU_WALLET_PASSWORD": "runbooks",
            "AZU_ONE_USER": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._options = options

    def type(self, command: str) -> str:
        """Run a command line, which has to succeed, and return what it prints."""
        # As a service manager has them: the options of this network.
        line = command.replace("azu up --background", f"azu up --background {self._options}")
        with tempfile.TemporaryFile("w+") as printed:
            # A file: a network in the background would keep a pipe open.
            done = subprocess.run(
                ("bash", "-c", line), env=self.environment, stdout=printed, stderr=printed, timeout=TIMEOUT_S
            )
            printed.seek(0)
            said = printed.read()
        assert done.returncode == 0, f"{line}: {said}"
        return said

    def ask(self, command: str) -> Any:
        return json.loads(self.type(f"{command} --json"))


def filled(command: str, values: Mapping[str, str]) -> str:
    """Return a command with its words in capitals replaced."""
    return re.sub(r"(?<![$\w{])([A-Z_]{4,})(?![\w=])", lambda found: values[found[1]], command)


def test_every_runbook_is_tried() -> None:
    assert set(ORDER) == runbooks().keys()


def test_the_runbooks_run_as_written() -> None:
    address = next(one for one in sorted(own_addresses()) if "." in one and not one.startswith("127."))
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        operator = Operator(folder, f"--ip {address} --trust-members --workers 2 --vram 512MiB --json")
        try:
            facts = json.loads(operator.type("azu up --background"))
            environment = operator.environment
            environment["AZU_URL"] = facts["url"]
            environment["AZU_TLS_CA"] = facts["authority"]
            operator.type("azu wallet new")
            operator.type(f"azu login {facts['url']}#{facts['network_id']}")
            operator.type(f"azu ticket new --host {address}")
            operator.type("azu wallet fund 2")
            operator.type("azu deposit 1")
            operator.type("azu prompt Hello --model azu/tiny-dense")
            values = {
                "FILE": str(folder / "copy.tar.gz"),
                "NODE": "worker-0",
                "NODE_ID": node_id(operator, "worker-0"),
                "KEY_ID": operator.ask("azu keys list")[0]["key_id"],
                "TICKET_ID": operator.ask("azu ticket list")[0]["ticket_id"],
            }
            operator.type(filled("azu ledger backup FILE", values))
            ran = 0
            for title in ORDER:
                if title == "A lost head":
                    operator.type("azu down")
                    environment["AZU_HOME"] = str(folder / "other")
                if title == "A key that leaked":
                    operator.type(f"azu ticket new --host {address}")
                    values["TICKET_ID"] = operator.ask("azu ticket list")[-1]["ticket_id"]
                for command in runbooks()[title]:
                    operator.type(filled(command, values))
                    ran += 1
            print(f"\n{ran} commands of {len(ORDER)} runbooks ran as written")
        finally:
            subprocess.run(("bash", "-c", "azu down"), env=operator.environment, timeout=120, check=False)


def node_id(operator: Operator, name: str) -> str:
    shown = operator.ask("azu ps")
    (found,) = (node["node_id"] for node in shown["nodes"] if node["name"] == name)
    return str(found)
