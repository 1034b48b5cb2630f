"""One network for each home, found and stopped by whoever asks."""

import subprocess
import sys
from pathlib import Path

import pytest

from azu.cli.network.running import running_in, stop_running
from azu.errors import Conflict, NotFound

HOLDER = """
import sys, time
from pathlib import Path
from azu.cli.network.running import running_in
with running_in(Path(sys.argv[1])):
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

    with pytest.raises(Conflict, match="already runs"), running_in(tmp_path):
        pass

    process.kill()
    process.wait()


def test_a_network_is_stopped_from_elsewhere(tmp_path: Path) -> None:
    process = holder(tmp_path)

    # Whoever started it may look after it later.
    stop_running(tmp_path, 20)

    with running_in(tmp_path):
        pass
    process.wait(20)


def test_a_network_that_was_killed_does_not_keep_its_home(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.wait()

    with pytest.raises(NotFound):
        stop_running(tmp_path, 1)
    with running_in(tmp_path):
        pass


def test_a_process_that_only_has_the_same_id_is_let_be(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (tmp_path / "network.json").write_text(f'{{"pid": {bystander.pid}, "created_s": 1.0}}')

    with pytest.raises(NotFound):
        stop_running(tmp_path, 1)

    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_where_none_runs_none_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        stop_running(tmp_path, 1)
