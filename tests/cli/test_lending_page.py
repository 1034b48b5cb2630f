"""The commands of a lender's first day in docs/lending.md, run as a lender types them."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.test_walk import Newcomer, newcomer  # noqa: F401 - a fixture

pytestmark = pytest.mark.prove

PAGE = Path(__file__).parents[2] / "docs" / "lending.md"
STEPS = ["wallet new", "login", "join", "ps", "earnings", "pause", "resume", "leave"]


def first_day() -> list[str]:
    """Return the commands of the first day, in order."""
    section = PAGE.read_text().partition("## A first day\n")[2].partition("\n## ")[0]
    return [line.strip() for line in re.findall(r"^    (azu .*)$", section, re.M)]


def test_a_first_day_has_every_step() -> None:
    commands = iter(first_day())
    assert all(any(command.startswith(f"azu {step}") for command in commands) for step in STEPS), first_day()


def test_a_lender_joins_is_asked_for_the_claim_pauses_and_leaves(
    newcomer: Newcomer,  # noqa: F811
) -> None:
    newcomer.type("azu up --background")
    newcomer.give_ticket()
    printed = {}
    for command in first_day():
        step = next(step for step in STEPS if command.startswith(f"azu {step}"))
        printed[step] = " ".join(newcomer.type(command).split())
        if step == "join":
            wait_until(newcomer, {"ada": "alive"})  # Ray has it a moment before the network

    assert "Now this machine would hold nothing" in printed["join"]
    assert "has claimed its earnings" in printed["join"]
    (pid,) = map(int, re.findall(r"kill (\d+)", printed["join"]))
    assert "alive" in printed["ps"]
    assert ", claimed" in printed["earnings"]
    assert "ada is paused and holds nothing" in printed["pause"]
    assert "ada lends again" in printed["resume"]
    assert "ada holds nothing any more" in printed["leave"]
    # The ticket is in no command line.
    assert newcomer.ticket not in " ".join(psutil.Process(pid).cmdline())
    os.kill(pid, signal.SIGINT)
    wait_until(newcomer, {"ada": "left"})
    assert not psutil.pid_exists(pid)


def wait_until(newcomer: Newcomer, expected: dict[str, str]) -> None:  # noqa: F811
    deadline_s = time.monotonic() + 60
    while states(newcomer) != expected:
        assert time.monotonic() < deadline_s, states(newcomer)
        time.sleep(0.5)


def states(newcomer: Newcomer) -> dict[str, str]:  # noqa: F811
    nodes = json.loads(newcomer.type("azu ps --json"))["nodes"]
    return {node["name"]: node["state"] for node in nodes}
