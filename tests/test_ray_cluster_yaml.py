"""Ray accepts ray_cluster.yaml, and its nodes are as azu needs them."""

import re
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from actors.placement import DEVICE_LABEL, NAME_LABEL, PAYOUT_LABEL, VRAM

FILE = Path(__file__).parents[1] / "ray_cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def start_command(config: dict[str, Any], kind: str) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the words of the command that starts Ray on the head or on a worker."""
    (line,) = [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line]
    words = shlex.split(line)
    at = words.index("ray")
    return dict(word.split("=", 1) for word in words[:at]), words[at:]


def test_ray_accepts_the_file(config) -> None:
    validate_config(prepare_config(config))


def test_ray_refuses_an_unknown_key(config) -> None:
    config["available_node_types"]["worker_l4"]["vram"] = 1
    with pytest.raises(Exception, match="vram"):
        validate_config(prepare_config(config))


def test_ray_accepts_the_variant_for_own_machines(config) -> None:
    own = deepcopy(config)
    for key in ("head_node_type", "available_node_types", "max_workers"):
        del own[key]
    own["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    prepared = prepare_config(own)

    validate_config(prepared)
    assert prepared["max_workers"] == 2


def test_workers_lend_vram_in_whole_mib_and_the_head_lends_none(config) -> None:
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])

    assert head["resources"][VRAM] == 0
    assert types
    for worker in types.values():
        assert isinstance(worker["resources"][VRAM], int)
        assert 4 * 1024 < worker["resources"][VRAM] < 192 * 1024


def test_a_worker_has_labels_for_name_device_and_payout(config) -> None:
    _, words = start_command(config, "worker")
    assert any(word.startswith(f"--labels={NAME_LABEL}=") for word in words)
    for name, worker in config["available_node_types"].items():
        if name != config["head_node_type"]:
            assert worker["labels"].keys() == {PAYOUT_LABEL, DEVICE_LABEL}
            assert re.fullmatch("0x[0-9a-f]{40}", worker["labels"][PAYOUT_LABEL])
            assert worker["labels"][DEVICE_LABEL] == "cuda"
            validate_node_label_syntax(worker["labels"])


def test_the_head_notices_dead_nodes_within_seconds(config) -> None:
    environment, _ = start_command(config, "head")
    prefix = "RAY_health_check_"
    assert {name: value for name, value in environment.items() if name.startswith(prefix)} == {
        f"{prefix}initial_delay_ms": "1000",
        f"{prefix}period_ms": "1000",
        f"{prefix}timeout_ms": "2000",
        f"{prefix}failure_threshold": "3",
    }


def test_the_images_carry_the_ray_that_azu_is_tested_with(config) -> None:
    for kind in ("head", "worker"):
        assert f":{ray.__version__}-" in config["docker"][f"{kind}_image"]


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_node_requires_the_token_and_every_option_is_one_of_rays(config, kind: str) -> None:
    environment, words = start_command(config, kind)
    known = {option for parameter in start.params for option in parameter.opts}

    assert environment["RAY_AUTH_MODE"] == "token"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert words[:2] == ["ray", "start"]
    assert {word.partition("=")[0] for word in words[2:]} <= known


def test_only_azus_own_machine_reaches_the_dashboard(config) -> None:
    _, words = start_command(config, "head")
    assert "--dashboard-host=127.0.0.1" in words
