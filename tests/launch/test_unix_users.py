"""Processes of another user start with little, are stopped with the rest, and end with a killed parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from azu.errors import Unavailable
from azu.launch.processes import ProcessGroup, ProcessSpec, session_members
from azu.launch.unix_users import UnixUser
from tests.launch.test_processes import PYTHON, eventually, exists
from tests.unix_users import second_user, share_interpreter

SHOWS_ITSELF = "id -un; id -G; pwd; umask; env; echo ready; sleep 600"
# The kernel's signal at the end of its parent is given up, as by a change of credentials.
CALLS_AZU = """
import ctypes, time
from azu.launch.processes import end_with_parent

ctypes.CDLL(None).prctl(1, 0)
end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
# Starts one child as the user whose name it gets, and waits for the test to kill it.
PARENT = """
import os, sys, time
from pathlib import Path
from azu.launch.processes import ProcessGroup, ProcessSpec
from azu.launch.unix_users import UnixUser

with ProcessGroup(Path(sys.argv[1]), user=UnixUser.find(sys.argv[2])) as group:
    group.start(ProcessSpec("child", tuple(sys.argv[3:]), dict(os.environ)))
    group.wait_until_printed("child", "^ready$", 30)
    print(group.pid("child"), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def user() -> UnixUser:
    return second_user()


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> None:
    second_user()
    share_interpreter(tmp_path_factory.mktemp("view"))


def shell(program: str, *, restart: bool = False) -> ProcessSpec:
    environment = {"PATH": os.defpath, "AWS_SECRET": "operators", "TMPDIR": "/root/tmp", "AZU_HOME": "/x"}
    return ProcessSpec("child", ("/bin/sh", "-c", program), environment, restart=restart)


@pytest.fixture
def killed_parent(tmp_path: Path, user: UnixUser) -> Iterator["KilledParent"]:
    parents = KilledParent(tmp_path, user)
    yield parents
    parents.clean()


class KilledParent:
    """Starts a child of another user through a parent of its own, and kills that parent."""

    def __init__(self, folder: Path, user: UnixUser) -> None:
        self._folder, self._user, self._sessions = folder, user, list[int]()

    def leaves(self, *command: str) -> int:
        arguments = (PYTHON, "-c", PARENT, str(self._folder), self._user.name, *command)
        parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        self._sessions.append(child)
        assert os.stat(f"/proc/{child}").st_uid == self._user.uid
        parent.kill()
        parent.wait(20)
        return child

    def clean(self) -> None:
        for pid in (pid for session in self._sessions for pid in session_members(session)):
            os.kill(pid, signal.SIGKILL)


def test_a_process_of_another_user_gets_no_right_and_no_secret_of_the_operator(
    tmp_path: Path, user: UnixUser
) -> None:
    with ProcessGroup(tmp_path / "logs", user=user) as group:
        group.start(shell(SHOWS_ITSELF))
        group.wait_until_printed("child", "^ready$", 10)
    name, groups, folder, umask, *environment = (tmp_path / "logs/child.log").read_text().splitlines()

    assert (name, folder, umask) == (user.name, "/", "0077")
    assert "0" not in groups.split()
    assert {"AZU_HOME=/x", f"HOME={user.home}", f"USER={user.name}"} <= set(environment)
    assert not [line for line in environment if line.startswith(("AWS_SECRET", "TMPDIR"))]


def test_the_operator_reads_its_log_and_the_user_does_not(tmp_path: Path, user: UnixUser) -> None:
    logs = tmp_path / "logs"
    with ProcessGroup(logs, user=user) as group:
        group.start(shell(f"cat {logs}/child.log; echo tried; exit 3"))
        with pytest.raises(Unavailable, match=r"(?s)denied.*tried"):
            group.wait_until("child", lambda: False, 10)

    assert (logs / "child.log").stat().st_uid == os.geteuid()


def test_it_is_stopped_and_started_again_as_any_other(tmp_path: Path, user: UnixUser) -> None:
    with ProcessGroup(tmp_path, user=user) as group:
        group.start(shell("sleep 600 & echo born; wait", restart=True))
        group.wait_until_printed("child", "^born$", 10)
        first = group.pid("child")
        os.kill(first, signal.SIGKILL)
        eventually(lambda: group.revive() == ["child"])
        group.wait_until_printed("child", "^born$", 10)
        second = group.pid("child")
        assert session_members(first) == []
        assert len(session_members(second)) == 2

    assert session_members(second) == []


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path, user: UnixUser) -> None:
    with ProcessGroup(tmp_path, user=user, stop_timeout_s=0.3) as group:
        group.start(shell("trap '' TERM; echo ready; while true; do sleep 1; done"))
        group.wait_until_printed("child", "^ready$", 10)
        pid = group.pid("child")

    assert session_members(pid) == []
    assert not exists(pid)


def test_a_program_that_knows_no_control_pipe_ends_with_a_killed_parent(killed_parent: KilledParent) -> None:
    child = killed_parent.leaves("/bin/sh", "-c", "echo ready; exec sleep 600")

    eventually(lambda: not exists(child))


@pytest.mark.usefixtures("interpreter")
def test_a_command_of_azu_ends_with_its_control_pipe_alone(killed_parent: KilledParent) -> None:
    child = killed_parent.leaves(sys.executable, "-c", CALLS_AZU)

    eventually(lambda: not exists(child))


def test_a_command_without_a_control_pipe_stays(tmp_path: Path) -> None:
    environment = {**os.environ, "AZU_CONTROL_PIPE": ""}
    del environment["AZU_CONTROL_PIPE"]
    alone = subprocess.Popen(
        [PYTHON, "-c", CALLS_AZU],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert alone.stdout is not None
    alone.stdout.readline()
    time.sleep(0.2)
    try:
        assert alone.poll() is None
    finally:
        os.killpg(alone.pid, signal.SIGKILL)
        alone.wait(20)
