"""ray_cluster.yaml on machines that are reached by SSH: azu serves there, is paid, and leaves nothing."""

import json
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
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from azu.units import LAMPORTS_PER_HYPE, MIB
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
        carry_azu(laptop)
        shutil.copy(Path(folder) / "key", laptop.home / ".ssh/id_ed25519")
        laptop.run("ray get-auth-token --generate")
        (laptop.home / "azu/local.yaml").write_text(yaml.safe_dump(on_own_machines(running)))
        yield running


def carry_azu(machine: Machine) -> None:
    """Copy this checkout to a machine."""
    left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, machine.home / "azu", ignore=left_out, dirs_exist_ok=True)


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
    *_, serve = config["head_start_ray_commands"]
    config["head_start_ray_commands"][-1] = serve.replace("azu serve", f"azu serve --payout {OWNERS['ada']}")
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
        "cd azu && WORKERS=2 LIMIT_S=240 tests/cloud.sh local.yaml", timeout_s=UP_TIMEOUT_S, check=False
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout

    receipt = only(done.stdout, "generation")["generation"]["receipt"]
    assert receipt["charged_lamports"] > 0
    assert set(receipt["worker_lamports"]) == {OWNERS["ada"]}, "the one address that is paid for the cluster"
    assert (
        only(done.stdout, "available_lamports")["available_lamports"]
        == 5 * LAMPORTS_PER_HYPE - receipt["charged_lamports"]
    )

    left = time.monotonic()
    cluster = [machines[name] for name in ("head", *OWNERS)]
    while remaining := [line for machine in cluster for line in machine.processes()]:
        assert time.monotonic() - left < LEAVE_TIMEOUT_S, remaining
        time.sleep(0.5)
    print(
        f"\nray up with {len(OWNERS)} workers, {receipt['charged_lamports']} lamports charged, ray down: "
        f"{seconds:.0f} s; the last process was gone {time.monotonic() - left:.0f} s later"
    )


WALLET = "export AZU_WALLET_PASSWORD=play AZU_HOME=~/.azu-e2e"
START = "RAY_AUTH_MODE=token ray start --disable-usage-stats --num-cpus 0"
KILL_SCHEDULER = "import ray; ray.init('auto'); ray.kill(ray.get_actor('scheduler', namespace='azu'))"
LIST_ACTORS = "import ray; ray.init('auto'); print('LEFT', ray.util.list_named_actors(all_namespaces=True))"
SERVED_TIMEOUT_S = 150.0


def answered(head: Machine) -> float:
    """Return the seconds until a paid prompt was answered, however often it has to be sent."""
    began = time.monotonic()
    prompt = "azu prompt 'What is the capital of France?' --max-tokens 8 --json"
    while head.run(f"{WALLET}; {prompt}", timeout_s=SERVED_TIMEOUT_S, check=False).returncode:
        assert time.monotonic() - began < SERVED_TIMEOUT_S
        time.sleep(1)
    return time.monotonic() - began


def test_azu_runs_as_a_serve_application_and_comes_back(machines: dict[str, Machine]) -> None:
    head, worker = machines["head"], machines["ada"]
    for machine in (head, worker):
        carry_azu(machine)
        machine.run("pip install --quiet --editable ~/azu[node]", timeout_s=120)
        (machine.home / ".ray").mkdir(exist_ok=True)
        shutil.copy(machines["laptop"].home / ".ray/auth_token", machine.home / ".ray/auth_token")
    head.run(f"{START} --head --port=6379", timeout_s=120)
    resources = shlex.quote(json.dumps({"VRAM": VRAM_MIB}))
    labels = f"azu-name=ada,azu-payout={OWNERS['ada']},azu-device=cpu"
    worker.run(f"{START} --address={head.ip}:6379 --resources={resources} --labels={labels}", timeout_s=120)

    opened = head.run("azu serve --books --background --json", timeout_s=120).stdout
    admin_key = only(opened, "admin_key")["admin_key"]
    files = [*(head.home / ".azu/serve").iterdir()]
    assert {file.name for file in files} == {"control.json", "ingress.json"}
    assert all(file.stat().st_mode & 0o077 == 0 and admin_key not in file.read_text() for file in files)
    head.run("RAY_AUTH_MODE=token serve deploy azu/configs/serve.yaml", timeout_s=120)
    began = time.monotonic()
    while head.run(f"{WALLET}; azu wallet new; azu wallet fund 10 && azu login", check=False).returncode:
        assert time.monotonic() - began < SERVED_TIMEOUT_S
        time.sleep(1)
    served_s = time.monotonic() - began
    head.run(f"{WALLET}; azu deposit 5", timeout_s=120)
    answered(head)

    head.run(f'RAY_AUTH_MODE=token python -c "{KILL_SCHEDULER}"', timeout_s=120)
    after_kill_s = answered(head)
    head.run("azu down && azu serve --books --background", timeout_s=180)
    after_books_s = answered(head)

    head.run("RAY_AUTH_MODE=token serve shutdown --yes", timeout_s=120)
    began = time.monotonic()
    while "LEFT []" not in head.run(f'RAY_AUTH_MODE=token python -c "{LIST_ACTORS}"').stdout:
        assert time.monotonic() - began < LEAVE_TIMEOUT_S
    head.run("azu down; ray stop", timeout_s=120)
    worker.run("ray stop", timeout_s=120)
    assert head.processes() + worker.processes() == []
    print(
        f"\nserve deploy, until the API answered: {served_s:.0f} s; a prompt answered {after_kill_s:.0f} s "
        f"after the scheduler was killed, {after_books_s:.0f} s after the books were opened anew"
    )


def test_its_node_types_come_when_they_are_asked_for_and_go_again(machines: dict[str, Machine]) -> None:
    machine = machines["ben"]
    carry_azu(machine)
    (machine.home / "growing.yaml").write_text(yaml.safe_dump(with_made_up_nodes()))
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    set_up = " ".join(f"{name}={value}" for name, value in environment.items())
    machine.run(
        f"{set_up} ray start --head --autoscaling-config=growing.yaml --num-cpus 0 --num-gpus 0 "
        "--include-dashboard false --disable-usage-stats",
        timeout_s=120,
    )
    asked = "cd azu && RAY_AUTH_MODE=disabled python -m tests.machines.growing 20000 40000"
    grown = machine.run(asked, timeout_s=450, check=False)
    machine.run("ray stop", timeout_s=120)

    assert grown.returncode == 0, grown.stdout
    *after, gone = [json.loads(line) for line in grown.stdout.splitlines() if line[:1] in "[{" and line]
    payout = "0x" + "0" * 40
    small, large = ([mib * MIB, payout, "cuda:0"] for mib in (21504, 44032))
    assert after[0] == [small]
    assert sorted(after[1]) == [small, large]
    print(f"\n20,000 and 40,000 MiB asked for: an L4 and an L40S came; gone {gone['gone_s']:.0f} s later")


def with_made_up_nodes() -> dict[str, Any]:
    """Return ray_cluster.yaml with nodes that are processes of one machine, as Ray's own tests have them."""
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    types = config["available_node_types"]
    types[FAKE_HEAD_NODE_TYPE] = types.pop(config["head_node_type"])
    commands = [key for key in config if key.endswith("_commands")]
    commands += ["initialization_commands", "head_setup_commands", "worker_setup_commands"]
    # By the name "fake_multinode" Ray looks for a file of defaults that its wheel lacks.
    module = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__qualname__}"
    provider = {"type": "external", "module": module}
    return config | {
        "provider": provider | {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "idle_timeout_minutes": 0.05,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{key: [] for key in (*commands, "cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }
