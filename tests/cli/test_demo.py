"""`azu demo` shows a whole paid prompt, leaves nothing behind however it ends, and runs again at once."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.prove

SEED = int(os.environ.get("AZU_TEST_SEED", "1"))
TIMEOUT_S = 400.0
# When Ctrl-C comes: while Redis and Ray start, while the control plane does, while a model is cut or answers.
INTERRUPTED_AFTER_S = sorted(random.Random(SEED).uniform(1, 45) for _ in range(4))


class Demo:
    """A running demo, with every process that it started."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "azu.cli", "demo", *arguments],
            env=kept | {"TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._seen: set[psutil.Process] = set()
        self._ports: set[int] = set()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def end(self, *, interrupted_after_s: float | None = None) -> tuple[int, str]:
        """Wait for the end, with Ctrl-C before it if asked for; return exit status and output."""
        try:
            if interrupted_after_s is not None:
                try:
                    self._process.wait(interrupted_after_s)
                except subprocess.TimeoutExpired:
                    self._process.send_signal(signal.SIGINT)
            output, errors = self._process.communicate(timeout=TIMEOUT_S)
        finally:
            self._process.kill()
            self._ended.set()
            self._watcher.join()
        assert "Traceback" not in errors, errors
        return self._process.returncode, output

    def left_behind(self) -> list[str]:
        """Return the processes and ports that are left."""
        psutil.wait_procs(self._seen, timeout=5)
        living = [str(process) for process in self._seen if process.is_running()]
        open_ports = {one.laddr.port for one in psutil.net_connections("tcp") if one.status == "LISTEN"}
        return living + [f"port {port}" for port in sorted(self._ports & open_ports)]

    def _watch(self) -> None:
        root = psutil.Process(self._process.pid)
        while not self._ended.wait(0.2):
            try:
                below = root.children(recursive=True)
            except psutil.NoSuchProcess:
                return
            self._seen.update(below)
            for process in below:
                try:
                    listening = process.net_connections("tcp")
                except psutil.Error:
                    continue
                self._ports.update(one.laddr.port for one in listening if one.status == "LISTEN")


@pytest.fixture
def folder() -> Iterator[Path]:
    """The folder of the demo's files; its path is short, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp") as made:
        yield Path(made)


def test_the_demo_shows_a_paid_prompt_and_leaves_nothing(folder: Path) -> None:
    demo = Demo(folder, "--json")

    exit_status, output = demo.end()

    assert exit_status == 0
    report = json.loads(output)
    print(f"demo: {report['seconds']} s")
    assert [run["model"] for run in report["runs"]] == ["azu/tiny-dense", "azu/tiny-moe"]
    for run in report["runs"]:
        assert "Paris" in run["text"]
        check_money(run)
    assert report["ledger_sum_lamports"] == 0
    dense, moe = (run["topology"] for run in report["runs"])
    assert len({line["node"] for line in dense if line["layers"][1] > line["layers"][0]}) >= 2
    assert max(len(nodes) for nodes in holders_by_layer(moe).values()) >= 2
    assert demo.left_behind() == []
    assert list(folder.iterdir()) == []


def check_money(run: dict[str, Any]) -> None:
    charged = run["charged_lamports"]
    assert charged == 2 * run["token_layers"]
    assert run["token_layers"] == (run["prompt_tokens"] + run["completion_tokens"]) * run["layers"]
    assert run["platform_lamports"] + sum(run["worker_lamports"].values()) == charged
    assert run["balance_before_lamports"] - run["balance_after_lamports"] == charged


def holders_by_layer(topology: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Return the nodes that hold experts, by layer."""
    holders: dict[str, set[str]] = {}
    for line in topology:
        for layer in line["experts"]:
            holders.setdefault(layer, set()).add(line["node"])
    return holders


@pytest.mark.parametrize("after_s", INTERRUPTED_AFTER_S)
def test_ctrl_c_at_any_step_leaves_nothing(folder: Path, after_s: float) -> None:
    demo = Demo(folder)

    exit_status, _ = demo.end(interrupted_after_s=after_s)

    assert exit_status == 130
    assert demo.left_behind() == []
    assert list(folder.iterdir()) == []


def test_a_second_demo_runs_right_after_the_first(folder: Path) -> None:
    for _ in range(2):
        assert Demo(folder, "--json").end()[0] == 0
