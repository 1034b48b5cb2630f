"""ray_cluster.yaml on machines that are reached by SSH: azu serves there, is paid, and leaves nothing."""

import json
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.machines import Machine, can_make_machines, lan
from tests.machines.machine import HOME

pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(not can_make_machines(), reason="needs root, namespaces, sshd and rsync"),
]

ROOT = Path(__file__).parents[1]
OWNERS = {"ada": "0x" + "ad" * 20, "ben": "0x" + "be" * 20}
VRAM_MIB = 2048
UP_TIMEOUT_S = 420.0
# A raylet whose head is gone looks for it so long.
LEAVE_TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[str, Machine]]:
    with (
        tempfile.TemporaryDirectory(prefix="azu-lan-", dir="/tmp") as folder,
        lan(Path(folder), ["laptop", "head", *OWNERS]) as running,
    ):
        for machine in running.values():
            machine.install(ray="ray.scripts.scripts:main", serve="ray.serve.scripts:cli")
        laptop = running["laptop"]
        left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, laptop.home / "azu", ignore=left_out)
        shutil.copy(Path(folder) / "key", laptop.home / ".ssh/id_ed25519")
        laptop.run("ray get-auth-token --generate")
        (laptop.home / "azu/local.yaml").write_text(yaml.safe_dump(on_own_machines(running)))
        yield running


def on_own_machines(machines: dict[str, Machine]) -> dict[str, Any]:
    """Return ray_cluster.yaml, changed as it says itself for machines of one's own."""
    config = deepcopy(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
    for key in ("head_node_type", "available_node_types", "max_workers", "docker"):
        del config[key]
    workers = [machines[name].ip for name in OWNERS]
    config["provider"] = {"type": "local", "head_ip": machines["head"].ip, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    config["head_start_ray_commands"] = [
        command.replace("ray start", "RAY_enable_autoscaler_v2=0 ray start")
        for command in config["head_start_ray_commands"]
    ]
    *_, start = config["worker_start_ray_commands"]
    labels = f'azu-name=$(hostname),azu-payout=$(cat {HOME}/payout),azu-device=cpu"'
    resources = shlex.quote(json.dumps({"VRAM": VRAM_MIB}))
    config["worker_start_ray_commands"][-1] = start.replace(
        'azu-name=$(hostname)"', f"{labels} --resources={resources}"
    )
    for name, owner in OWNERS.items():
        (machines[name].home / "payout").write_text(owner)
    return config


def only(output: str, key: str) -> dict[str, Any]:
    """Return the one JSON object with a key that commands printed among other lines."""
    lines = [line.strip() for line in output.splitlines()]
    printed = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    (found,) = [facts for facts in printed if key in facts]
    return found


def test_a_prompt_is_answered_and_paid_and_nothing_stays(machines: dict[str, Machine]) -> None:
    started = time.monotonic()
    done = machines["laptop"].run(
        "cd azu && WORKERS=2 tests/cloud.sh local.yaml", timeout_s=UP_TIMEOUT_S, check=False
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout

    receipt = only(done.stdout, "generation")["receipt"]
    assert receipt["charged_lamports"] > 0
    assert set(receipt["worker_lamports"]) <= set(OWNERS.values())
    assert (
        only(done.stdout, "available_lamports")["available_lamports"]
        == 5 * 10**8 - receipt["charged_lamports"]
    )
    assert all(re.search(rf"│ {name} +│ alive", done.stdout) for name in OWNERS)

    left = time.monotonic()
    cluster = [machines[name] for name in ("head", *OWNERS)]
    while remaining := [line for machine in cluster for line in machine.processes()]:
        assert time.monotonic() - left < LEAVE_TIMEOUT_S, remaining
        time.sleep(0.5)
    print(
        f"\nray up with {len(OWNERS)} workers, {receipt['charged_lamports']} lamports charged, ray down: "
        f"{seconds:.0f} s; the last process was gone {time.monotonic() - left:.0f} s later"
    )
