"""No child outlives its parent, and no grandchild its grandparent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from azu.errors import DeadlineExceeded, Unavailable
from azu.launch.processes import ProcessGroup, ProcessSpec, session_members

PYTHON = sys.executable
# Starts a grandchild in a process group of its own, as Ray's nodes do with their workers, and waits.
FAMILY = """
import subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
print("grandchild", grandchild.pid, flush=True)
time.sleep(600)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(600)"


def python(program: str, *, name: str = "child", restart: bool = False) -> ProcessSpec:
    environment = {"PATH": os.defpath, "PYTHONUNBUFFERED": "1"}
    return ProcessSpec(name, (PYTHON, "-c", program), environment, restart=restart)


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def exists(pid: int) -> bool:
    """Say whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_stop_ends_children_and_what_they_started(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as children:
        children.start(python(FAMILY))
        children.wait_until_said("child", r"^grandchild \d+$", 10)
        pid = children.pid("child")
        assert len(session_members(pid)) == 2

    assert session_members(pid) == []
    assert not exists(pid)


def test_a_grandchild_whose_parent_died_is_ended_too(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as children:
        children.start(python(FAMILY))
        children.wait_until_said("child", r"^grandchild \d+$", 10)
        pid = children.pid("child")
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: children.ended() == ["child"])
        assert len(session_members(pid)) == 1

    assert session_members(pid) == []


def test_a_child_that_does_not_listen_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path, stop_timeout_s=0.3) as children:
        children.start(python(DEAF))
        children.wait_until_said("child", "^ready$", 10)
        pid = children.pid("child")

    assert not exists(pid)


def test_all_are_asked_to_end_before_any_is_killed(tmp_path: Path) -> None:
    polite = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), exit(0)));"
    with ProcessGroup(tmp_path) as children:
        for name in ("a", "b", "c"):
            children.start(python(f"{polite} print('ready'); time.sleep(600)", name=name))
        for name in ("a", "b", "c"):
            children.wait_until_said(name, "^ready$", 10)
        started = time.monotonic()

    assert time.monotonic() - started < 1.4


def test_waiting_for_a_child_that_ends_tells_its_last_words(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as children:
        children.start(python("raise SystemExit('no room in here')"))

        with pytest.raises(Unavailable, match="no room in here"):
            children.wait_until("child", lambda: False, 10)


def test_waiting_for_a_child_that_is_not_ready_ends(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as children:
        children.start(python("print('thinking'); import time; time.sleep(600)"))
        children.wait_until_said("child", "thinking", 10)

        with pytest.raises(DeadlineExceeded, match="thinking"):
            children.wait_until("child", lambda: False, 0.1)


def test_who_died_is_started_again_and_later_each_time(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as children:
        children.start(python("print('born')", restart=True))
        revived_s: list[float] = []

        def revive_once() -> bool:
            if children.revive():
                revived_s.append(time.monotonic())
                return True
            return False

        for _ in range(3):
            eventually(revive_once)

    first, second = revived_s[1] - revived_s[0], revived_s[2] - revived_s[1]
    assert 0.9 < first < second
    assert (tmp_path / "child.log").read_text().startswith("born\n" * 3)


def test_who_shall_not_start_again_stays_ended(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as children:
        children.start(python("pass"))
        eventually(lambda: children.ended() == ["child"])

        assert children.revive() == []


def test_what_a_child_said_before_it_was_started_again_does_not_count(tmp_path: Path) -> None:
    once = tmp_path / "once"
    program = f"import pathlib, time; p = pathlib.Path({str(once)!r})\n"
    program += "if p.exists(): time.sleep(600)\np.touch(); print('ready')"
    with ProcessGroup(tmp_path) as children:
        children.start(python(program, restart=True))
        children.wait_until_said("child", "^ready$", 10)
        eventually(lambda: children.revive() == ["child"])

        assert not children.said("child", "^ready$")


def test_logs_can_be_read_by_their_owner_alone(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "logs") as children:
        children.start(python("pass"))

    assert (tmp_path / "logs" / "child.log").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700


# A parent that starts a family and then waits; how it ends is the test's affair.
PARENT = f"""
import sys, time
from pathlib import Path
from azu.launch.processes import ProcessGroup, ProcessSpec, ending_as_interrupt

with ending_as_interrupt(), ProcessGroup(Path(sys.argv[1])) as children:
    children.start(ProcessSpec("child", (sys.executable, "-c", {FAMILY!r}), {{}}))
    children.wait_until_said("child", "^grandchild ", 30)
    print("ready", children.pid("child"), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_parent_that_is_interrupted_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen([PYTHON, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline().split()[1])

    parent.send_signal(number)
    parent.send_signal(number)
    parent.wait(20)

    assert session_members(child) == []


def test_a_parent_that_is_killed_takes_its_children_along(tmp_path: Path) -> None:
    parent = subprocess.Popen([PYTHON, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline().split()[1])

    parent.kill()
    parent.wait(20)

    eventually(lambda: not exists(child))
    for orphan in session_members(child):  # nobody watches over grandchildren; Ray's end by themselves
        os.kill(orphan, signal.SIGKILL)
