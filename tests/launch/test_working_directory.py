"""Folders of a user's working directory that have the names of azu's packages are never imported."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import azu
from azu.files import write_private
from azu.launch.processes import ProcessGroup, ProcessSpec, free_port
from azu.launch.ray_nodes import HEAD, STARTED, RayHost, Worker, driver_environment
from azu.units import MIB

ROOT = Path(__file__).parents[2]
NAMES = ("actors", "configs", "deployments", "tests")
PACKAGES = Path(azu.__file__).parents[1]
AZUS_OWN = [str(PACKAGES / path) for path in ("actors/scheduler.py", "deployments/app.py", "azu/__init__.py")]
START_TIMEOUT_S = 200.0
# What a process finds, and only then the working directory in front of everything, as `python -c` has it.
DATA = """
import sys
from pathlib import Path
import actors, deployments
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
# Drivers of their own: this session's process may be connected to another cluster.
DRIVER = """
import json, os, sys
from contextlib import contextmanager
from pathlib import Path
import ray
from azu.launch.serving import connected

@ray.remote(num_cpus=0)
def imported():
    import actors.scheduler, deployments.app, azu
    return [module.__file__ for module in (actors.scheduler, deployments.app, azu)]

@contextmanager
def as_ray_does(address, logs, environment):
    ray.init(address, namespace="azu", log_to_driver=False)
    yield

address, logs, folder, connect, *names = sys.argv[1:]
with {"azu": connected, "ray": as_ray_does}[connect](address, Path(logs), dict(os.environ)):
    nodes = [imported.options(label_selector={"azu-name": name}) for name in names]
    print(json.dumps(ray.get([node.remote() for node in [imported, *nodes]])))
assert Path.cwd() == Path(folder)
"""


Cluster = tuple[RayHost, ProcessGroup]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory where every import of one of azu's names raises."""
    folder = tmp_path / "work"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('the user\\'s {name}')\n")
    return folder


@pytest.fixture
def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A host for Ray nodes that start in the working directory."""
    monkeypatch.chdir(folder)
    with tempfile.TemporaryDirectory(prefix="azu-test-", dir="/tmp", ignore_cleanup_errors=True) as sockets:
        host = RayHost(Path(sockets), Path(sockets) / "token")
        write_private(host.token_path, secrets.token_hex(32))
        with ProcessGroup(host.folder / "logs") as nodes:
            yield host, nodes


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


@pytest.mark.prove
def test_a_command_imports_what_it_needs_from_azu(folder: Path, tmp_path: Path) -> None:
    nodes = str(ROOT / "configs" / "nodes.example.yaml")
    planned = run(
        folder, "-m", "azu.cli", "plan", "azu/tiny-moe", "--nodes", nodes, "--json", AZU_HOME=str(tmp_path)
    )  # fmt: skip

    assert json.loads(planned)["model_id"] == "azu/tiny-moe"


def test_policy_page_and_built_in_models_are_those_of_azu(folder: Path) -> None:
    run(folder, "-P", "-c", DATA)


@pytest.mark.prove
def test_workers_of_azus_nodes_import_azus_packages(cluster: Cluster, folder: Path) -> None:
    host, nodes = cluster
    head = f"127.0.0.1:{(port := free_port())}"
    nodes.start(host.head(port))
    nodes.start(host.worker(head, Worker(0, "worker", 4 * MIB, "0x" + "a1" * 20)))
    for name in (HEAD, "worker"):
        nodes.wait_until_printed(name, STARTED, START_TIMEOUT_S)

    assert imported_by(host, folder, head, "azu", "worker") == 2 * [AZUS_OWN]


@pytest.mark.prove
def test_workers_of_other_nodes_do_with_the_variable_that_serve_yaml_names(
    cluster: Cluster, folder: Path
) -> None:
    variable = "RAY_preload_python_modules=actors,deployments"
    assert variable in (ROOT / "configs" / "serve.yaml").read_text()
    host, nodes = cluster
    head = host.head(port := free_port())
    environment = dict(head.environment) | dict([variable.split("=")])
    nodes.start(ProcessSpec(HEAD, head.arguments, environment))
    nodes.wait_until_printed(HEAD, STARTED, START_TIMEOUT_S)

    assert imported_by(host, folder, f"127.0.0.1:{port}", "ray") == [AZUS_OWN]


def imported_by(host: RayHost, folder: Path, head: str, *arguments: str) -> list[list[str]]:
    """Return the files of the modules that workers import, for a driver in the folder."""
    driver = folder.parent / "driver.py"
    driver.write_text(DRIVER)
    environment = driver_environment(host.token_path)
    printed = run(
        folder, "-P", str(driver), head, str(host.folder / "logs"), str(folder), *arguments, **environment
    )
    files: list[list[str]] = json.loads(printed.splitlines()[-1])
    return files
