"""Code that runs in the cluster finds no private key: not in an environment, not in a log."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from azu.launch.local_network import LocalNetwork
from tests.network.conftest import UNUSED_KEY, ledger_redis_url

pytestmark = pytest.mark.cluster

TOKEN = "RAY_AUTH_TOKEN_PATH"
NAMES = ("SCHEDULER_PRIVATE_KEY", "AZU_PRIVATE_KEY_FILE", "AZU_WALLET_PASSWORD", "REDIS_PASSWORD")


@dataclass(frozen=True)
class Environments:
    """The environments that a process can read: of all processes, and of those that Ray started."""

    all: tuple[str, ...]
    rays: tuple[str, ...]


def environments() -> Environments:
    everybodys, rays = [], [repr(dict(os.environ))]
    for process in psutil.process_iter():
        try:
            environment = repr(process.environ())
            lineage = {process.name(), *(parent.name() for parent in process.parents())}
        except psutil.Error:
            continue  # it has ended, or another user owns it
        everybodys.append(environment)
        if lineage & {"raylet", "gcs_server"}:
            rays.append(environment)
    return Environments(tuple(everybodys), tuple(rays))


@pytest.fixture
def platform_key(network: LocalNetwork, tmp_path_factory: pytest.TempPathFactory) -> str:
    [file] = tmp_path_factory.getbasetemp().glob("azu0/devnet.key")
    return file.read_text()


@pytest.mark.prove
def test_a_task_on_any_node_finds_no_private_key(network: LocalNetwork, platform_key: str) -> None:
    # Ray's workers import azu's packages only, not the tests.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    look = ray.remote(num_cpus=0)(environments)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    assert len(nodes) >= 4
    affinities = [NodeAffinitySchedulingStrategy(node_id, soft=False) for node_id in nodes]
    looks = [look.options(scheduling_strategy=affinity).remote() for affinity in affinities]
    for seen in ray.get(looks, timeout=120):
        # Ray's workers write their titles over what the kernel shows of their environment.
        assert sum(TOKEN in environment for environment in seen.rays) >= 4, "the search works"
        assert any("AZU_SIGNER_URL" in environment for environment in seen.all), "the treasury is seen"
        for secret in (platform_key, UNUSED_KEY):
            assert not any(secret in environment for environment in seen.all)
        for name in NAMES:
            assert not any(name in environment for environment in seen.rays)


def test_no_log_shows_a_private_key_or_a_password_of_redis(
    network: LocalNetwork, platform_key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    urls = (network.redis_url, ledger_redis_url(network), network.books_url)
    passwords = [str(urlsplit(url).password) for url in urls]
    home = tmp_path_factory.getbasetemp()
    logs = [*home.glob("azu0/logs/*"), *ray_logs()]
    read = [path.read_bytes() for path in logs if path.is_file()]
    assert len(read) > 10
    assert any(b"treasury ready" in content for content in read), "the search works"
    for secret in (platform_key, UNUSED_KEY, *passwords):
        assert secret
        assert not any(secret.encode() in content for content in read)


def ray_logs() -> list[Path]:
    return list(Path(ray._private.worker._global_node.get_logs_dir_path()).rglob("*"))
