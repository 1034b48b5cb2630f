import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from azu.errors import Conflict, NotFound, Unavailable
from azu.launch import network_process
from azu.launch.network_process import home_locked, run_in_background, stop_network, watch
from azu.launch.processes import stop_signals_raised
from azu.money.chain import wallet


def test_an_interrupt_that_a_library_swallowed_still_ends_the_watch() -> None:
    calls = []

    def revive() -> list[str]:
        calls.append(time.monotonic())
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            pass  # as a finalizer does
        return []

    with stop_signals_raised() as stop, pytest.raises(KeyboardInterrupt):
        watch(revive, stop)

    assert len(calls) == 1


def test_a_watch_goes_on_after_an_unknown_exception_and_ends_after_five_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network_process, "_WATCH_S", 0.0)
    odd = OSError("no more processes")
    revivals: list[OSError | list[str]] = [*[odd] * 4, ["treasury"], *[odd] * 5]
    calls = iter(revivals)

    def revive() -> list[str]:
        found = next(calls)
        if isinstance(found, OSError):
            raise found
        return found

    with stop_signals_raised() as stop, pytest.raises(OSError, match="no more processes"):
        watch(revive, stop)

    assert next(calls, None) is None


TIMEOUT_S = 60.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    return tmp_path


def test_the_printed_facts_come_back_and_only_their_owner_can_read_the_files(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = wallet.create(home / "wallet.json", "password").address.lower()
    monkeypatch.setattr(sys, "argv", ["azu", "wallet", "show", "--background"])

    steps: list[str] = []
    assert run_in_background(home, TIMEOUT_S, step=steps.append)["address"] == address
    files = [home / "background.json", home / "logs" / "background.log"]
    assert [file.stat().st_mode & 0o077 for file in files] == [0, 0]


def test_a_command_whose_user_gives_up_waiting_does_not_go_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "import sys, time; print('a step', file=sys.stderr, flush=True); time.sleep(600)"
    monkeypatch.setattr(network_process, "azu_command", lambda *_: (sys.executable, "-c", slow))
    began: list[list[psutil.Process]] = []

    def give_up(_: str) -> None:
        # A child of another test that has ended has no command line any more.
        lines = [(one, one.as_dict(["cmdline"])["cmdline"]) for one in psutil.Process().children()]
        began.append([one for one, line in lines if slow in (line or ())])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_background(home, TIMEOUT_S, step=give_up)
    _, alive = psutil.wait_procs(began[0], timeout=TIMEOUT_S)
    assert not alive


def test_the_error_says_why_the_command_did_not_come_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["azu", "wallet", "show", "--background"])

    with pytest.raises(Unavailable, match="there is no wallet"):
        run_in_background(home, TIMEOUT_S)


def test_the_error_shows_the_message_about_a_bad_option(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["azu", "wallet", "show", "--nothing", "--background"])

    with pytest.raises(Unavailable, match="No such option"):
        run_in_background(home, TIMEOUT_S)


HOLDER = """
import sys, time
from pathlib import Path
from azu.launch.network_process import home_locked
with home_locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(home: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(home)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_home_has_one_network(tmp_path: Path) -> None:
    process = holder(tmp_path)

    with pytest.raises(Conflict, match="already runs"), home_locked(tmp_path):
        pass

    process.kill()
    process.wait()


def test_a_network_is_stopped_from_elsewhere(tmp_path: Path) -> None:
    process = holder(tmp_path)

    # Its parent waits for it later.
    stop_network(tmp_path, 20)

    with home_locked(tmp_path):
        pass
    process.wait(20)


def test_a_network_that_was_killed_does_not_keep_its_home(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.wait()

    with pytest.raises(NotFound):
        stop_network(tmp_path, 1)
    with home_locked(tmp_path):
        pass


def test_another_process_with_the_same_id_is_left_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (tmp_path / "network.json").write_text(f'{{"pid": {bystander.pid}, "created_s": 1.0}}')

    with pytest.raises(NotFound):
        stop_network(tmp_path, 1)

    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_stopping_without_a_network_raises(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        stop_network(tmp_path, 1)
