"""Folders of a user's working directory that have the names of azu's packages are never imported."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from azu.files import write_private
from azu.launch.processes import ProcessGroup, free_port
from azu.launch.ray_nodes import HEAD, STARTED, RayHost, Worker, driver_environment
from azu.units import MIB

ROOT = Path(__file__).parents[2]
NAMES = ("actors", "configs", "deployments", "tests")
START_TIMEOUT_S = 200.0
# What a process finds, and only then the working directory in front of everything, as `python -c` has it.
DATA = """
import sys
from pathlib import Path
import deployments
sys.path.insert(0, str(Path.cwd()))
from azu.config import load_network
from azu.launch.local_network import DEMO
from azu.models.sources import find_source
from deployments import page
assert load_network(DEMO).workers
assert find_source("azu/tiny-moe", None, ()).folder.is_dir()
assert "index.html" in page._FILES
assert "configs" not in sys.modules
"""
# A driver of its own: this session's process may be connected to another cluster.
DRIVER = """
import json, os, sys
from pathlib import Path
from azu.launch.serving import connected

with connected(sys.argv[1], Path(sys.argv[2]), dict(os.environ)):
    import ray

    @ray.remote(num_cpus=0)
    def imported():
        import actors.scheduler, deployments.app, azu
        return [module.__file__ for module in (actors.scheduler, deployments.app, azu)]

    nodes = [imported.options(label_selector={"azu-name": "worker"}), imported]
    print(json.dumps(ray.get([node.remote() for node in nodes])))
assert Path.cwd() == Path(sys.argv[3])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory where every import of one of azu's names raises."""
    folder = tmp_path / "work"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('the user\\'s {name}')\n")
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_start_however_they_are_called(folder: Path) -> None:
    script = str(Path(sys.executable).with_name("azu"))

    for command in ([script, "--help"], ["-m", "azu.cli", "--help"]):
        assert "Usage" in run(folder, *command)


def test_a_command_imports_what_it_needs_from_azu(folder: Path, tmp_path: Path) -> None:
    nodes = str(ROOT / "configs" / "nodes.example.yaml")
    planned = run(
        folder, "-m", "azu.cli", "plan", "azu/tiny-moe", "--nodes", nodes, "--json", AZU_HOME=str(tmp_path)
    )  # fmt: skip

    assert json.loads(planned)["model_id"] == "azu/tiny-moe"


def test_policy_page_and_built_in_models_are_those_of_azu(folder: Path) -> None:
    run(folder, "-P", "-c", DATA)


@pytest.mark.prove
def test_ray_workers_import_azus_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    head = f"127.0.0.1:{(port := free_port())}"
    with tempfile.TemporaryDirectory(
        prefix="azu-test-", dir="/tmp", ignore_cleanup_errors=True
    ) as ray_folder:
        host = RayHost(Path(ray_folder), Path(ray_folder) / "token")
        write_private(host.token_path, secrets.token_hex(32))
        logs = host.folder / "logs"
        with ProcessGroup(logs) as nodes:
            nodes.start(host.head(port))
            nodes.start(host.worker(head, Worker(0, "worker", 4 * MIB, "0x" + "a1" * 20)))
            for name in (HEAD, "worker"):
                nodes.wait_until_printed(name, STARTED, START_TIMEOUT_S)
            driver = folder.parent / "driver.py"
            driver.write_text(DRIVER)
            printed = run(
                folder, "-P", str(driver), head, str(logs), str(folder), **driver_environment(host.token_path)
            )

    package = Path(sys.modules["azu"].__file__ or "").parents[1]
    found = json.loads(printed.splitlines()[-1])
    assert found == 2 * [
        [str(package / path) for path in ("actors/scheduler.py", "deployments/app.py", "azu/__init__.py")]
    ]
