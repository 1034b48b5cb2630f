"""A process group stops every child and everything that the children started."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from azu.errors import DeadlineExceeded, Unavailable
from azu.launch.processes import (
    _FIRST_RESTART_S,
    Patience,
    ProcessGroup,
    ProcessSpec,
    _Restart,
    own_addresses,
    own_network,
    session_members,
)
from tests.few import few
from tests.logged import logged

PYTHON = sys.executable
# Starts a grandchild in a process group of its own, as Ray's nodes do with their workers, and waits.
FAMILY = """
import subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
print("grandchild", grandchild.pid, flush=True)
time.sleep(600)
"""
IGNORES_SIGTERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready")
time.sleep(600)
"""
# At SIGTERM it writes a file, and ends by itself once the files of three such processes are there.
ENDS_WITH_OTHERS = """
import pathlib, signal, sys, time

def end(*_):
    folder = pathlib.Path(sys.argv[1])
    (folder / f"{sys.argv[2]}.asked").touch()
    while len(list(folder.glob("*.asked"))) < 3:
        time.sleep(0.01)
    (folder / f"{sys.argv[2]}.ended").touch()
    sys.exit()

signal.signal(signal.SIGTERM, end)
print("ready")
time.sleep(600)
"""


def python(program: str, *arguments: str, name: str = "child", restart: bool = False) -> ProcessSpec:
    environment = {"PATH": os.defpath, "PYTHONUNBUFFERED": "1"}
    return ProcessSpec(name, (PYTHON, "-c", program, *arguments), environment, restart=restart)


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def exists(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_start_has_variables_of_its_own_and_waits_while_they_cannot_be_had(tmp_path: Path) -> None:
    given = iter(["1", None, "2"])

    def each_start() -> dict[str, str]:
        if (number := next(given)) is None:
            raise Unavailable("the books are away")
        return {"NUMBER": number}

    spec = python("import os; print('start', os.environ['NUMBER'])", restart=True)
    with ProcessGroup(tmp_path) as group:
        group.start(replace(spec, each_start=each_start))
        group.wait_until_printed("child", "^start 1$", 10)
        eventually(lambda: group.revive() == ["child"])
        group.wait_until_printed("child", "^start 2$", 10)


@pytest.mark.prove
def test_a_child_that_the_machine_cannot_start_now_is_started_later(tmp_path: Path) -> None:
    logs, away = tmp_path / "logs", tmp_path / "away"
    with ProcessGroup(logs) as group:
        group.start(python("print('ran')", restart=True))
        eventually(lambda: group.ended() == ["child"])
        logs.rename(away)
        with logged() as lines:
            eventually(lambda: group.revive() == [] and lines())
            time.sleep(2 * _FIRST_RESTART_S)
            assert group.revive() + group.revive() == []
            assert len(lines()) == 1, "what goes on is said once"
            assert group.ended() == ["child"]
        away.rename(logs)
        eventually(lambda: group.revive() == ["child"])


def test_a_log_that_was_removed_keeps_no_child_from_its_restart(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        group.start(python("print('ran')", restart=True))
        (tmp_path / "child.log").unlink()
        eventually(lambda: group.revive() == ["child"])


def test_stop_ends_children_and_what_they_started(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        group.start(python(FAMILY))
        group.wait_until_printed("child", r"^grandchild \d+$", 10)
        pid = group.pid("child")
        assert len(session_members(pid)) == 2

    assert session_members(pid) == []
    assert not exists(pid)


def test_a_grandchild_whose_parent_died_is_ended_too(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        group.start(python(FAMILY))
        group.wait_until_printed("child", r"^grandchild \d+$", 10)
        pid = group.pid("child")
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: group.ended() == ["child"])
        assert len(session_members(pid)) == 1

    assert session_members(pid) == []


def test_a_child_that_ignores_sigterm_is_killed_after_the_timeout(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path, stop_timeout_s=0.3) as group:
        group.start(python(IGNORES_SIGTERM))
        group.wait_until_printed("child", "^ready$", 10)
        pid = group.pid("child")

    assert not exists(pid)


def test_every_child_gets_sigterm_before_any_is_killed(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path, stop_timeout_s=60) as group:
        for name in ("a", "b", "c"):
            group.start(python(ENDS_WITH_OTHERS, str(tmp_path), name, name=name))
        for name in ("a", "b", "c"):
            group.wait_until_printed(name, "^ready$", 10)

    assert sorted(path.name for path in tmp_path.glob("*.ended")) == ["a.ended", "b.ended", "c.ended"]


def test_the_error_for_a_child_that_ended_shows_its_last_output(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        group.start(python("raise SystemExit('no room in here')"))

        with pytest.raises(Unavailable, match="no room in here"):
            group.wait_until("child", lambda: False, 10)


def test_waiting_for_a_child_that_is_not_ready_times_out(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        group.start(python("print('thinking'); import time; time.sleep(600)"))
        group.wait_until_printed("child", "thinking", 10)

        with pytest.raises(DeadlineExceeded, match="thinking"):
            group.wait_until("child", lambda: False, 0.1)


@pytest.mark.prove
def test_a_child_that_ends_is_started_again_each_time(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        group.start(python("print('born')", restart=True))
        for _ in range(3):
            eventually(lambda: group.revive() == ["child"])

    assert (tmp_path / "child.log").read_text().startswith("born\n" * 3)


def test_the_delay_grows_while_a_child_ends_young() -> None:
    restart = _Restart()
    delays_s = []
    for lived_s in (1, 1, 1, 100, 1, *[1] * 10):
        restart.schedule(lived_s=lived_s)
        delays_s.append(restart.delay_s)

    assert delays_s[:5] == [0.5, 1, 2, 0.5, 1]
    assert delays_s[-1] == 30


def test_one_child_is_started_again_and_the_others_stay(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        for name in ("first", "second"):
            group.start(ProcessSpec(name, (PYTHON, "-c", FAMILY), dict(os.environ), restart=True))
        for name in ("first", "second"):
            group.wait_until_printed(name, "grandchild", 20)
        before = {name: group.pid(name) for name in ("first", "second")}

        group.restart("first")

        assert session_members(before["first"]) == []
        assert group.pid("first") != before["first"]
        assert group.pid("second") == before["second"]
        group.wait_until_printed("first", "grandchild", 20)
        assert group.revive() == []


def test_a_machine_knows_its_own_addresses_and_their_networks() -> None:
    assert "127.0.0.1" in own_addresses()
    assert own_network("127.0.0.1") == "127.0.0.0/8"
    assert own_network("192.0.2.77") is None


def test_a_child_without_restart_stays_ended(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        group.start(python("pass"))
        eventually(lambda: group.ended() == ["child"])

        assert group.revive() == []


def test_output_from_before_a_restart_does_not_count(tmp_path: Path) -> None:
    once = tmp_path / "once"
    program = f"import pathlib, time; p = pathlib.Path({str(once)!r})\n"
    program += "if p.exists(): time.sleep(600)\np.touch(); print('ready')"
    with ProcessGroup(tmp_path) as group:
        group.start(python(program, restart=True))
        group.wait_until_printed("child", "^ready$", 10)
        eventually(lambda: group.revive() == ["child"])

        assert not group.has_printed("child", "^ready$")


def test_a_full_log_is_moved_aside_and_its_process_goes_on_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("azu.launch.processes._MAX_LOG_BYTES", 10_000)
    with ProcessGroup(tmp_path) as group:
        group.start(python("print('first', flush=True)\nwhile True: print('x' * 99, flush=True)"))
        log = tmp_path / "child.log"
        for _ in range(3):
            while log.stat().st_size <= 10_000:
                time.sleep(0.001)
            group.revive()
        assert (tmp_path / "child.log.1").stat().st_size > 10_000
        assert sorted(path.name for path in tmp_path.iterdir()) == ["child.log", "child.log.1"]
        assert not group.has_printed("child", "^first$")
        assert (tmp_path / "child.log.1").stat().st_mode & 0o077 == 0


def test_a_full_log_is_emptied_though_the_disk_has_no_room_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr("azu.launch.processes._MAX_LOG_BYTES", 10_000)
    monkeypatch.setattr("azu.launch.processes.shutil.copy", full)
    with ProcessGroup(tmp_path) as group:
        group.start(python("print('x' * 20_000, flush=True)\nimport time; time.sleep(60)"))
        group.wait_until_printed("child", "^x+$", 10)

        assert group.revive() == []
        assert (tmp_path / "child.log").stat().st_size == 0


def test_logs_can_be_read_by_their_owner_alone(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path / "logs") as group:
        group.start(python("pass"))

    assert (tmp_path / "logs" / "child.log").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700


# A parent that starts a child with a grandchild and then waits; each test ends it in its own way.
PARENT = f"""
import sys, time
from pathlib import Path
from azu.launch.processes import ProcessGroup, ProcessSpec, stop_signals_raised

with stop_signals_raised(), ProcessGroup(Path(sys.argv[1])) as group:
    group.start(ProcessSpec("child", (sys.executable, "-c", {FAMILY!r}), {{}}))
    group.wait_until_printed("child", "^grandchild ", 30)
    print("ready", group.pid("child"), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", few([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
def test_a_parent_that_is_interrupted_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen([PYTHON, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline().split()[1])

    parent.send_signal(number)
    parent.send_signal(number)
    parent.wait(20)

    assert session_members(child) == []


def test_the_children_of_a_killed_parent_end(tmp_path: Path) -> None:
    parent = subprocess.Popen([PYTHON, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline().split()[1])

    parent.kill()
    parent.wait(20)

    eventually(lambda: not exists(child))
    # The kernel does not end grandchildren; Ray's processes end by themselves.
    for orphan in session_members(child):
        os.kill(orphan, signal.SIGKILL)


def test_a_busy_machine_is_waited_for_longer() -> None:
    now_s, load, cores = 0.0, 0.0, os.cpu_count() or 1
    patience = Patience(10.0, lambda: now_s, lambda: load)

    now_s = 10.0
    assert not patience.is_over
    load = 3.0 * cores
    now_s = 30.0
    assert not patience.is_over
    # What was busy before is not cut short once the machine is not.
    load = 0.0
    assert not patience.is_over
    now_s = 30.1
    assert patience.is_over
    assert str(patience) == "in 30 s"
