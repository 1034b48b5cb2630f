"""The commands of the README's walk, run as a newcomer types them."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from azu.launch.processes import free_port, session_members
from azu.units import LAMPORTS_PER_HYPE, hype_from_lamports, lamports_from_hype

pytestmark = pytest.mark.prove

README = Path(__file__).parents[2] / "README.md"
# A word in capitals in the README stands for something that an earlier command printed.
PRINTED = {
    "NETWORK": re.compile(r"azu login (\S+)"),
    "TICKET": re.compile(r"azu join (\S+)"),
    "0xYOURS": re.compile(r"^(0x[0-9a-f]{40})  \(", re.MULTILINE),
    "JOB": re.compile(r"(job-[0-9a-f]{24})"),
}
# What `azu up` prints at each start of a network.
SAME_PRINTED = (PRINTED["NETWORK"], PRINTED["TICKET"], re.compile(r"admin key +(\S+)"))
STEPS = [
    "up", "wallet new", "join", "wallet fund", "login", "deposit", "prompt", "jobs", "receipt", "earnings",
    "balance", "ps", "down",
]  # fmt: skip
TIMEOUT_S = 400


def walk() -> list[str]:
    """Return the commands of the README's walk, in order."""
    section = README.read_text().partition("## A walk through it\n")[2].partition("\n## ")[0]
    block = re.search(r"((?:    azu .*\n)+)", section)
    assert block is not None
    lines = [line.partition("#")[0].strip() for line in block[1].splitlines()]
    return [command.strip() for line in lines for command in line.split(";")]


def test_the_walk_has_every_step() -> None:
    # In this order; other steps may be between them.
    commands = iter(walk())
    assert all(any(command.startswith(f"azu {step}") for command in commands) for step in STEPS), walk()


class Newcomer:
    """A user with two terminals on one machine, who copies what one command printed into the next."""

    def __init__(self, home: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
        self._environment = kept | {
            "AZU_HOME": str(home),
            "AZU_HTTP_PORT": str(free_port()),
            "AZU_WALLET_PASSWORD": "walk",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "COLUMNS": "80",
        }
        self._known: dict[str, str] = {}
        self.joined: subprocess.Popen[str] | None = None

    def type(self, command: str) -> str:
        """Return what a command prints; `azu join` keeps running in the second terminal."""
        for word, value in self._known.items():
            command = re.sub(rf"\b{word}\b", value, command)
        if command.startswith("azu join") and "--background" not in command:
            self.joined = self._start(command)
            return ""
        process = self._start(command)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, f"{command}\n{output}"
        for word, pattern in PRINTED.items():
            if word not in self._known and (found := pattern.search(output)):
                self._known[word] = found[1]
        return output

    @property
    def ticket(self) -> str:
        """What `azu up` printed to join with."""
        return self._known["TICKET"]

    def give_ticket(self) -> None:
        """Have the ticket in the environment of the next commands."""
        self._environment["AZU_TICKET"] = self.ticket

    def leave(self) -> list[int]:
        """End the command in the second terminal; returns the sessions that it had."""
        joined, self.joined = self.joined, None
        if joined is None:
            return []
        sessions = [child.pid for child in psutil.Process(joined.pid).children()]
        joined.send_signal(signal.SIGINT)
        joined.wait(60)
        return sessions

    def _start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def newcomer() -> Iterator[Newcomer]:
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        person = Newcomer(Path(folder))
        try:
            yield person
        finally:
            person.leave()
            if (Path(folder) / "network.json").exists():
                person.type("azu down")


def test_a_newcomer_lends_pays_and_earns(newcomer: Newcomer) -> None:
    printed, seconds = {}, {}
    for command in walk():
        step = next((step for step in STEPS if command.startswith(f"azu {step}")), command)
        began = time.monotonic()
        printed[step] = newcomer.type(command)
        seconds[step] = time.monotonic() - began

    charged = charge(printed["prompt"], "charged")
    earned = charge(printed["receipt"], "worker 0x[0-9a-f]{40}")
    assert charged == charge(printed["receipt"], "charged") > 0
    assert "signed by" in printed["receipt"]
    # The model was cold: what is waited for is told.
    told = re.search(r"^(Fetching|Loading|Looking|Cutting)\b", printed["prompt"], re.MULTILINE)
    assert told is not None, printed["prompt"]
    assert "not checked" not in printed["login"]
    assert all("charged for the tokens that came" in printed[step] for step in ("prompt", "receipt"))
    # The only worker gets the whole share of the workers.
    assert earned == charged - charge(printed["receipt"], "platform") == charged * 80 // 100
    assert re.search(rf"earned, not yet paid[^\d]+{hype_from_lamports(earned)}\b", printed["earnings"])
    # The text may be wrapped.
    assert ", claimed" in " ".join(printed["earnings"].split())
    left = hype_from_lamports(5 * LAMPORTS_PER_HYPE - charged)
    assert re.search(rf"available\D+{left}\b", printed["balance"])
    assert all(not session_members(session) for session in newcomer.leave())
    print(f"\n{charged} lamports charged, {earned} earned; seconds: ", end="")
    print(", ".join(f"{step} {taken:.1f}" for step, taken in seconds.items()))


def test_money_of_the_first_day_is_right_on_the_second(newcomer: Newcomer) -> None:
    first = newcomer.type("azu up --background")
    for command in ("wallet new", "wallet fund 10", "login NETWORK", "deposit 5", "down"):
        newcomer.type(f"azu {command}")

    again = newcomer.type("azu up --background")

    # With the key of the first day.
    assert re.search(r"available\D+5\b", newcomer.type("azu balance"))
    assert "are back at 0x" in newcomer.type("azu withdraw 2")
    assert re.search(r"available\D+3\b", newcomer.type("azu balance"))
    newcomer.type("azu wallet fund 1")
    assert "Credited 1 HYPE" in newcomer.type("azu deposit 1")
    # It compares every account with the chain's own figures.
    newcomer.type("azu ledger audit")
    assert [pattern.search(again)[1] for pattern in SAME_PRINTED] == [
        pattern.search(first)[1] for pattern in SAME_PRINTED
    ]


def charge(output: str, what: str) -> int:
    """Return the lamports beside a word in a receipt."""
    found = re.search(rf"{what} +([\d.]+) HYPE", output)
    assert found is not None, output
    return lamports_from_hype(found[1])
