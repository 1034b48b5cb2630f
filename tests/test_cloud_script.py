"""tests/cloud.sh stops its cluster in whatever way it ends; tests/test_ray_up.py runs it on real machines."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "cloud.sh"
# It writes its arguments down, and fails or sleeps at a word that the test gives.
RAY = """\
#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[ "$1" = get-head-ip ] && exit "${HEAD_LEFT:-1}"
case "$*" in *"${FAIL_AT:-nowhere}"*) exit 3 ;; *"${STAY_AT:-nowhere}"*) sleep 60 ;; esac
"""
TIMEOUT_S = 30


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts the script with a `ray` that replaces the cloud."""
    (tmp_path / "ray").write_text(RAY)
    (tmp_path / "ray").chmod(0o755)

    def start(*arguments: str, **behaviour: str) -> subprocess.Popen[str]:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        return subprocess.Popen(
            [str(SCRIPT), *arguments],
            cwd=ROOT,
            env=environment | {"TMPDIR": str(tmp_path)} | behaviour,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def calls(tmp_path: Path) -> list[str]:
    """Return the first word of each call of `ray`."""
    path = tmp_path / "calls"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_dry_run_prints_every_step_and_calls_nothing(start, tmp_path: Path) -> None:
    process = start("--dry-run")
    output, _ = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 0
    steps = [line.split()[2] for line in output.splitlines()]
    assert steps == ["up", "exec", "exec", "exec", "exec", "down"]
    for command in ("azu wallet fund", "azu deposit", "azu prompt", "azu balance"):
        assert command in output
    assert calls(tmp_path) == []


def test_all_steps_of_a_run_name_one_new_cluster(start) -> None:
    first, second = (start("--dry-run").communicate(timeout=TIMEOUT_S)[0] for _ in range(2))

    named = {line.split("--cluster-name ")[1].split()[0] for line in first.splitlines()}
    assert len(named) == 1
    assert named.isdisjoint(second.split())


def test_a_run_that_succeeds_stops_the_cluster_and_leaves_no_file(start, tmp_path: Path) -> None:
    process = start("ray_cluster.yaml")
    process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 0
    assert calls(tmp_path) == ["up", "exec", "exec", "exec", "exec", "down", "get-head-ip"]
    assert {path.name for path in tmp_path.iterdir()} == {"ray", "calls"}


@pytest.mark.parametrize("step", ["up -y", "azu wallet", "azu prompt", "azu balance"])
def test_a_run_that_fails_stops_the_cluster_and_fails(start, tmp_path: Path, step: str) -> None:
    process = start("ray_cluster.yaml", FAIL_AT=step)
    process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 3
    assert calls(tmp_path)[-2:] == ["down", "get-head-ip"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", ["up -y", "azu prompt"])
def test_an_interrupted_run_stops_the_cluster_at_once(
    start, tmp_path: Path, step: str, number: signal.Signals
) -> None:
    process = start("ray_cluster.yaml", STAY_AT=step)
    deadline = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "calls").exists() or step not in (tmp_path / "calls").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)

    process.send_signal(number)
    process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == {signal.SIGINT: 130}.get(number, 143)
    assert calls(tmp_path)[-2:] == ["down", "get-head-ip"]


@pytest.mark.parametrize("behaviour", [{"FAIL_AT": "down"}, {"HEAD_LEFT": "0"}])
def test_a_cluster_that_may_still_run_is_reported(start, tmp_path: Path, behaviour) -> None:
    process = start("ray_cluster.yaml", **behaviour)
    output, _ = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 90
    assert "MAY STILL BE THERE" in output
    assert calls(tmp_path).count("down") == (3 if "FAIL_AT" in behaviour else 1)


def test_machines_are_terminated_not_stopped(start, tmp_path: Path) -> None:
    (tmp_path / "ray").write_text('#!/usr/bin/env bash\n[ "$1" = up ] && cat "${@: -1}" >>"$CALLS"\nexit 1\n')
    start("ray_cluster.yaml").communicate(timeout=TIMEOUT_S)

    assert "cache_stopped_nodes: false" in (tmp_path / "calls").read_text()
