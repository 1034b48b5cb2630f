"""Ray nodes start side by side on one machine, get no secret, and end with everything that they started."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from ray._private.label_utils import parse_node_labels_string

from azu.engine.device import device_bytes
from azu.errors import ConfigurationError
from azu.files import write_private
from azu.launch.processes import ProcessGroup, free_port, session_members
from azu.launch.ray_nodes import (
    HEAD,
    STARTED,
    RayHost,
    Worker,
    check_lent,
    driver_environment,
    socket_folder,
)
from azu.units import GIB, MIB

START_TIMEOUT_S = 200.0
OWNER = "0x" + "a1" * 20
SECRETS = (
    "SCHEDULER_PRIVATE_KEY", "AZU_PRIVATE_KEY_FILE", "AZU_WALLET_PASSWORD", "AZU_ADMIN_KEY", "AZU_API_KEY",
    "REDIS_PASSWORD", "AZU_TICKET",
)  # fmt: skip


@pytest.fixture
def host() -> Iterator[RayHost]:
    with tempfile.TemporaryDirectory(prefix="azu-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token_path = Path(folder) / "token"
        write_private(token_path, secrets.token_hex(32))
        yield RayHost(Path(folder), token_path)


def worker(index: int, cuda_device: str | None = None) -> Worker:
    return Worker(index, f"worker-{index}", 4 * MIB, OWNER, cuda_device)


@pytest.mark.parametrize(
    ("lent", "fault"),
    [
        ([("0", 24), ("1", 24), (None, 16)], None),
        ([("0", 500)], r"500\.0 GiB are more than GPU 0 has, which is 24\.0 GiB"),
        ([("0", 16), ("0", 16)], r"32\.0 GiB are more than GPU 0"),
        ([(None, 10), (None, 10)], r"20\.0 GiB are more than this machine has, which is 16\.0 GiB"),
        ([("MIG-7", 500)], None),  # the driver does not know it
    ],
)
def test_no_device_lends_more_than_it_has(lent: list[tuple[str | None, int]], fault: str | None) -> None:
    workers = [Worker(index, "ada", size * GIB, OWNER, gpu) for index, (gpu, size) in enumerate(lent)]
    sizes = {"0": 24 * GIB, "1": 24 * GIB, None: 16 * GIB}

    with nullcontext() if fault is None else pytest.raises(ConfigurationError, match=fault):
        check_lent(workers, sizes.get)


def test_this_machine_lends_no_more_than_its_memory() -> None:
    has = device_bytes(None)
    assert has is not None
    assert has <= psutil.virtual_memory().total
    check_lent([Worker(0, "ada", has // MIB * MIB, OWNER)], device_bytes)
    with pytest.raises(ConfigurationError, match="than this machine has"):
        check_lent([Worker(0, "ada", 2**50, OWNER)], device_bytes)


@pytest.mark.parametrize("name", SECRETS)
def test_nodes_do_not_inherit_secrets(host: RayHost, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "hunter2")

    for command in (host.head(6379), host.worker("192.0.2.7:6379", worker(0))):
        assert "hunter2" not in command.environment.values()


def test_workers_do_not_get_the_hubs_token(host: RayHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    assert "HF_TOKEN" in host.head(6379).environment
    assert "HF_TOKEN" not in host.worker("192.0.2.7:6379", worker(0)).environment


def test_every_node_requires_the_token(host: RayHost) -> None:
    for command in (host.head(6379), host.worker("192.0.2.7:6379", worker(0))):
        assert command.environment["RAY_AUTH_MODE"] == "token"
        assert command.environment["RAY_AUTH_TOKEN_PATH"] == str(host.token_path)


def test_the_address_of_another_cluster_is_left_out(host: RayHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "198.51.100.1:6379")

    assert "RAY_ADDRESS" not in host.head(6379).environment


def test_what_ray_remembers_is_bounded_by_settings_that_this_ray_knows(host: RayHost) -> None:
    ray = find_spec("ray")
    assert ray is not None
    known = Path(str(ray.origin)).with_name("core").joinpath("src/ray/gcs/gcs_server").read_bytes()
    head, node = (
        command.environment for command in (host.head(6379), host.worker("192.0.2.7:6379", worker(0)))
    )
    bounds = {name: int(value) for name, value in head.items() if "_max_" in name or "maximum_" in name}
    assert len(bounds) == 6
    for name, bound in bounds.items():
        assert name.removeprefix("RAY_").encode() in known, name
        assert 1000 <= bound <= 5000
    for environment in (head, node):
        assert environment["RAY_ROTATION_BACKUP_COUNT"] == "2"
        assert int(environment["RAY_ROTATION_MAX_BYTES"]) == 16 * MIB
        assert environment["RAY_task_events_max_num_status_events_buffer_on_worker"] == "1000"


def test_a_worker_sees_its_own_gpu_alone(host: RayHost) -> None:
    on_gpu = host.worker("192.0.2.7:6379", worker(1, "GPU-8f1c"))
    on_cpu = host.worker("192.0.2.7:6379", worker(0))

    assert on_gpu.environment["CUDA_VISIBLE_DEVICES"] == "GPU-8f1c"
    assert on_cpu.environment["CUDA_VISIBLE_DEVICES"] == ""
    for node, device in ((on_gpu, "cuda"), (on_cpu, "cpu")):
        # As Ray reads them, which ends at once for a label that it does not take.
        labels = parse_node_labels_string(node.arguments[node.arguments.index("--labels") + 1])
        assert labels["azu-device"] == device


def test_a_worker_is_enrolled_with_a_new_id_before_each_start(host: RayHost) -> None:
    enrolled: list[str] = []
    spec = host.worker("192.0.2.7:6379", worker(0), enrolled.append)
    assert enrolled == []

    first, second = spec.starting().environment, spec.starting().environment

    assert [one["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] for one in (first, second)] == enrolled
    assert len(set(enrolled)) == 2
    assert all(len(bytes.fromhex(one)) == 28 for one in enrolled)


def test_a_home_too_long_for_sockets_gets_a_folder_elsewhere(tmp_path: Path) -> None:
    far = tmp_path / ("long" * 30)
    with socket_folder(far) as folder:
        assert folder != far
        assert len(str(folder)) < 30
    assert not folder.exists()


def test_a_short_home_keeps_the_logs_until_the_next_time() -> None:
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp") as home:
        with socket_folder(Path(home) / "ray") as folder:
            (folder / "log").touch()
        assert (folder / "log").exists()
        with socket_folder(Path(home) / "ray") as again:
            assert list(again.iterdir()) == []


PRINT_NODES = """
import json, ray, sys
ray.init(sys.argv[1], namespace="azu", log_to_driver=False, logging_level="error")

@ray.remote(num_cpus=0)
def environment():
    import os
    return dict(os.environ)

alive = [node for node in ray.nodes() if node["Alive"]]
lenders = [(n["Labels"]["azu-name"], n["Resources"]["VRAM"]) for n in alive if "azu-name" in n["Labels"]]
asked = [environment.options(label_selector={"azu-name": name}).remote() for name, _ in lenders]
environments = ray.get(asked)
ids = [n["NodeID"] for n in alive if "azu-name" in n["Labels"]]
print(json.dumps({"alive": len(alive), "lenders": sorted(lenders), "environments": environments, "ids": ids}))
"""


@pytest.mark.prove
def test_a_head_and_three_workers_on_one_machine(host: RayHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEDULER_PRIVATE_KEY", "hunter2")
    head = f"127.0.0.1:{(port := free_port())}"
    enrolled: list[str] = []
    with ProcessGroup(host.folder / "logs") as nodes:
        nodes.start(host.head(port))
        for index in range(3):
            nodes.start(host.worker(head, worker(index), enrolled.append))
        for name in (HEAD, "worker-0", "worker-1", "worker-2"):
            nodes.wait_until_printed(name, STARTED, START_TIMEOUT_S)
        sessions = [nodes.pid(name) for name in (HEAD, "worker-0", "worker-1", "worker-2")]
        environment = os.environ | driver_environment(host.token_path)
        environment.pop("SCHEDULER_PRIVATE_KEY")
        printed = subprocess.run(
            [sys.executable, "-c", PRINT_NODES, head],
            env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False,
        )  # fmt: skip
        without_token = subprocess.run(
            [sys.executable, "-c", PRINT_NODES, head],
            env=environment | {"RAY_AUTH_TOKEN_PATH": _other_token(host.folder)},
            capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False,
        )  # fmt: skip

    assert printed.returncode == 0, printed.stderr
    assert '"alive": 4' in printed.stdout
    assert '["worker-0", 4.0], ["worker-1", 4.0], ["worker-2", 4.0]' in printed.stdout
    assert sorted(json.loads(printed.stdout.splitlines()[-1])["ids"]) == sorted(enrolled)
    assert "hunter2" not in printed.stdout
    assert without_token.returncode != 0
    assert [session_members(session) for session in sessions] == [[], [], [], []]


@pytest.mark.prove
def test_a_worker_node_that_dies_comes_back(host: RayHost) -> None:
    head = f"127.0.0.1:{(port := free_port())}"
    with ProcessGroup(host.folder / "logs") as nodes:
        nodes.start(host.head(port))
        nodes.start(host.worker(head, worker(0)))
        nodes.wait_until_printed("worker-0", STARTED, START_TIMEOUT_S)
        (raylet,) = (p for p in psutil.Process(nodes.pid("worker-0")).children() if "raylet" in p.name())

        raylet.kill()

        deadline = time.monotonic() + 30
        while nodes.revive() != ["worker-0"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        nodes.wait_until_printed("worker-0", STARTED, START_TIMEOUT_S)


# A parent that runs a head and a worker until the test kills it.
PARENT = """
import sys, time
from pathlib import Path
from azu.launch.processes import ProcessGroup
from azu.launch.ray_nodes import STARTED, RayHost, Worker

host = RayHost(Path(sys.argv[1]), Path(sys.argv[1]) / "token")
with ProcessGroup(host.folder / "logs") as nodes:
    nodes.start(host.head(int(sys.argv[2])))
    nodes.start(host.worker(f"127.0.0.1:{sys.argv[2]}", Worker(0, "ada", 4 << 20, "0x" + "a1" * 20)))
    nodes.wait_until_printed("ada", STARTED, 200)
    print("ready", nodes.pid("ray-head"), nodes.pid("ada"), flush=True)
    time.sleep(600)
"""


@pytest.mark.prove
def test_when_the_parent_is_killed_every_ray_process_ends(host: RayHost) -> None:
    command = [sys.executable, "-c", PARENT, str(host.folder), str(free_port())]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    sessions = [int(word) for word in parent.stdout.readline().split()[1:]]
    assert all(session_members(session) for session in sessions)

    parent.kill()
    parent.wait(20)

    # Ray's agents try for a minute to report to the dead head.
    deadline = time.monotonic() + 120
    while left := [pid for session in sessions for pid in session_members(session)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _other_token(folder: Path) -> str:
    path = folder / "other-token"
    write_private(path, secrets.token_hex(32))
    return str(path)
