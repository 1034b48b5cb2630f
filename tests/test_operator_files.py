"""The files for systemd, Compose and Kubernetes run commands that azu has, and stores as money needs them."""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.serve.schema import ServeDeploySchema

from actors.node import _PIECES, NodeAgent
from actors.placement import DEVICE_LABEL, PAYOUT_LABEL, VRAM, WorkerNode
from azu.money.ledger.durability import DURABLE_CONFIG
from tests.builders import OWNERS
from tests.test_docs import wrong_arguments

CONFIGS = Path(__file__).parents[1] / "configs"
UNITS = sorted((CONFIGS / "systemd").iterdir())
COMPOSE = yaml.safe_load((CONFIGS / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
CLAIM, RAY_SERVICE = yaml.safe_load_all((CONFIGS / "kubernetes" / "rayservice.yaml").read_text())
AZU = "/opt/azu/bin/azu"
# What Compose's specification has, of that what is used here.
SERVICE_KEYS = {
    "profiles", "image", "build", "user", "network_mode", "command", "environment", "volumes", "init",
    "shm_size", "stop_grace_period", "restart", "deploy",
}  # fmt: skip


def unit_commands(unit: Path) -> list[list[str]]:
    """Return the words of each command of a unit after the program's name."""
    lines = re.findall(r"^Exec(?:Start|Stop)=(.*)$", unit.read_text(), re.M)
    found = [re.search(rf"{AZU} ([^'$]*(?:\$\{{\w+\}}[^'$]*)*)", line) for line in lines]
    return [shlex.split(one[1]) for one in found if one]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_runs_commands_of_azu(unit: Path) -> None:
    commands = unit_commands(unit)

    assert bool(commands) == (unit.suffix == ".service")
    assert [wrong_arguments(words) for words in commands] == [None] * len(commands)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    program = tmp_path / "azu"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace(AZU, str(program)))
    # The money's own user is made on the head.
    text = (tmp_path / "azu-serve.service").read_text()
    (tmp_path / "azu-serve.service").write_text(text.replace("User=azu-money", "User=root"))
    done = subprocess.run(
        ("systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit.name) for unit in UNITS)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    ours = [line for line in done.stderr.splitlines() if "azu" in line]
    assert ours == []


def test_copies_are_deleted_after_30_days_and_nothing_else_is(tmp_path: Path) -> None:
    text = (CONFIGS / "systemd" / "azu-copy.service").read_text()
    (line,) = re.findall(r"^ExecStartPost=(.*)$", text, re.M)
    for name, days in (("new.tar.gz", 29), ("old.tar.gz", 32), ("old.txt", 32)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, times=(time.time() - days * 86_400,) * 2)

    subprocess.run(shlex.split(line.replace("/var/backups/azu", str(tmp_path))), check=True, timeout=60)

    assert {file.name for file in tmp_path.iterdir()} == {"new.tar.gz", "old.txt"}


def test_the_heads_unit_lets_running_answers_end_before_systemd_kills_it() -> None:
    text = (CONFIGS / "systemd" / "azu-head.service").read_text()

    within_s = int(re.findall(r"--drain --within (\d+)", text)[0])
    (stop_min,) = re.findall(r"^TimeoutStopSec=(\d+)min$", text, re.M)
    assert 60 * int(stop_min) > within_s + 60


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_of_compose_is_whole(name: str) -> None:
    service = SERVICES[name]

    assert service.keys() <= SERVICE_KEYS
    for volume in service["volumes"]:
        assert volume.partition(":")[0] in COMPOSE["volumes"]
    if "build" in service:
        assert (CONFIGS / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert wrong_arguments([re.sub(r"\$\{.*\}", "VALUE", word) for word in service["command"]]) is None


def test_the_store_of_compose_is_as_durable_as_azus_own() -> None:
    given = dict(
        word.removeprefix("--").split(" ", 1)
        for word in SERVICES["store"]["command"]
        if word.startswith("--")
    )

    for name, value in DURABLE_CONFIG.items():
        if name != "appendfilename":
            assert given[name].strip('"') == value


def containers(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in group["template"]["spec"]["containers"]}


def test_kubernetes_gets_a_ray_service_with_one_set_of_books() -> None:
    spec = RAY_SERVICE["spec"]
    cluster = spec["rayClusterConfig"]
    head = containers(cluster["headGroupSpec"])

    assert (RAY_SERVICE["apiVersion"], RAY_SERVICE["kind"]) == ("ray.io/v1", "RayService")
    assert spec.keys() == {"upgradeStrategy", "serveConfigV2", "rayClusterConfig"}
    assert cluster.keys() == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert spec["upgradeStrategy"] == {"type": "None"}
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert list(head) == ["ray-head", "money"]
    assert wrong_arguments([str(word) for word in head["money"]["args"]]) is None
    # Of the money's folder Ray's container sees the files for Serve alone.
    (seen,) = head["ray-head"]["volumeMounts"]
    assert seen in head["money"]["volumeMounts"]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"])).applications
    assert application.args == {"folder": seen["mountPath"]}
    own = yaml.safe_load((CONFIGS / "serve.yaml").read_text())["applications"]
    assert application.import_path == own[0]["import_path"]


def test_kubernetes_workers_say_what_they_lend_and_who_is_paid() -> None:
    for group in RAY_SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert group.keys() == {
            "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "resources", "labels",
            "template",
        }  # fmt: skip
        # Ray's operator refuses resources in two places.
        assert (
            group["rayStartParams"].keys() & {"num-cpus", "num-gpus", "memory", "resources", "labels"}
            == set()
        )
        assert group["resources"].keys() == {"CPU", "GPU", VRAM}
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["labels"].keys() == {PAYOUT_LABEL, DEVICE_LABEL}
        validate_node_label_syntax(group["labels"])
        (worker,) = containers(group).values()
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"  # a Ray node is one GPU


class Hook:
    """What a container's preStop runs, in a home of its own; `proc` stands for the pod's processes."""

    def __init__(self, pod: dict[str, Any], name: str, home: Path) -> None:
        (container,) = [one for one in pod["template"]["spec"]["containers"] if one["name"] == name]
        self.words = [str(word) for word in container["lifecycle"]["preStop"]["exec"]["command"]]
        self.longest_s = sum(map(int, re.findall(r"(?:sleep|timeout|seq|--within) (\d{1,})", self.words[-1])))
        self._home = home

    def start(self) -> "subprocess.Popen[str]":
        text = self.words[-1].replace("/proc/", f"{self._home}/proc/").replace("sleep 5;", "sleep 0.5;")
        path = f"{self._home}/bin:{os.defpath}"
        return subprocess.Popen(
            (*self.words[:-1], text), env={"HOME": str(self._home), "PATH": path}, text=True
        )


def test_a_head_of_kubernetes_that_is_rolled_ends_its_answers_before_ray_is_stopped(tmp_path: Path) -> None:
    group = RAY_SERVICE["spec"]["rayClusterConfig"]["headGroupSpec"]
    of_ray, of_money = (Hook(group, name, tmp_path) for name in ("ray-head", "money"))
    (drains,) = re.findall(r"azu (.*?);", of_money.words[-1])
    assert wrong_arguments(drains.split()) is None
    # `azu down` without it ends the container's first process, and with it the hook.
    assert "--drain-only" in drains
    assert of_money.longest_s < of_ray.longest_s < group["template"]["spec"]["terminationGracePeriodSeconds"]

    (tmp_path / ".azu" / "serve").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    azu = tmp_path / "bin" / "azu"
    azu.write_text('#!/bin/sh\necho "$@" > ~/asked; until test -e ~/ended; do sleep 0.05; done\n')
    azu.chmod(0o755)
    # Only Ray's container is started again: nothing drains, and nothing is waited for.
    assert of_ray.start().wait(30) == 0
    hooks = [of_money.start(), of_ray.start()]
    while not (tmp_path / "asked").exists():
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        hooks[1].wait(2)
    (tmp_path / "ended").touch()

    assert [hook.wait(30) for hook in hooks] == [0, 0]
    assert list((tmp_path / ".azu" / "serve").iterdir()) == []


def test_a_worker_of_kubernetes_that_is_rolled_gives_its_pieces_away_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,) = RAY_SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    hook = Hook(group, "ray-worker", tmp_path)
    assert hook.longest_s < group["template"]["spec"]["terminationGracePeriodSeconds"]
    (mount,) = containers(group)["ray-worker"]["volumeMounts"]
    assert mount["mountPath"] == "/home/ray/.azu"
    monkeypatch.delenv("AZU_HOME", raising=False)
    node = WorkerNode("0123456789", "01234567", OWNERS[0], "cpu", 1, "192.0.2.7:7")
    agent = NodeAgent(node, tmp_path / ".azu")
    pieces = [tmp_path / "proc" / str(number) / "cmdline" for number in range(len(_PIECES))]
    for piece, title in zip(pieces, _PIECES, strict=True):
        piece.parent.mkdir(parents=True)
        piece.write_text(f"{title}.step")

    stopping = hook.start()

    while not agent._why_paused({}):
        time.sleep(0.05)
    for piece in pieces:
        with pytest.raises(subprocess.TimeoutExpired):
            stopping.wait(0.5)
        piece.write_text("ray::IDLE")
    assert stopping.wait(30) == 0
    assert not agent._why_paused({}), "a container that is started again in this pod lends again"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here")
def test_kubectl_reads_the_manifest(tmp_path: Path) -> None:
    command = ("kubectl", "kustomize", str(tmp_path))
    shutil.copy(CONFIGS / "kubernetes" / "rayservice.yaml", tmp_path)
    (tmp_path / "kustomization.yaml").write_text("resources: [rayservice.yaml]\n")

    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]}
    )

    assert done.returncode == 0, done.stderr
    assert len(list(yaml.safe_load_all(done.stdout))) == 2
