"""Network files override the default policy; unknown keys are refused."""

import random
from importlib.resources import files
from pathlib import Path

import pytest

from azu.config import load_network
from azu.config.network import RetryPolicy
from azu.errors import ConfigurationError
from azu.units import MIB

WORKER = "workers: [{name: ada, vram: 4MiB, payout: '0x%s'}]" % ("A1" * 20)


def network_file(folder: Path, text: str) -> Path:
    path = folder / "network.yaml"
    path.write_text(text)
    return path


def test_the_default_network_is_complete() -> None:
    network = load_network()

    assert network.policy.price.lamports_per_token_layer == 2
    assert network.policy.price.platform_percent == 20
    assert network.policy.limits.max_body_bytes == MIB
    assert network.workers == ()


def test_the_demo_has_three_workers_with_different_owners() -> None:
    demo = load_network(files("configs") / "demo.yaml")

    assert len(demo.workers) == 3
    assert len({worker.payout for worker in demo.workers}) == 3
    assert demo.policy.price == load_network().policy.price


def test_jobs_wait_for_new_nodes_only_where_an_autoscaler_adds_them() -> None:
    standard, autoscaled = load_network(), load_network(files("configs") / "autoscaled.yaml")

    assert not standard.policy.requeue.nodes_come
    assert autoscaled.policy.requeue.nodes_come
    assert autoscaled.policy.requeue.budget_s > standard.policy.requeue.budget_s


def test_a_job_may_be_tried_any_number_of_times() -> None:
    patience = RetryPolicy(first_s=1, longest_s=8, budget_s=10**6)

    assert 4 <= patience.wait_s(10**6, random.Random(1)) <= 8


def test_a_file_overrides_single_values(tmp_path: Path) -> None:
    path = network_file(tmp_path, "policy: {price: {platform_percent: 5}, planner: {margin_bytes: 1MiB}}")

    policy = load_network(path).policy

    assert policy.price.platform_percent == 5
    assert policy.price.lamports_per_token_layer == 2
    assert policy.planner.margin_bytes == MIB


def test_workers_have_a_name_a_size_and_an_owner(tmp_path: Path) -> None:
    (worker,) = load_network(network_file(tmp_path, WORKER)).workers

    assert (worker.name, worker.vram, worker.device) == ("ada", 4 * MIB, "cpu")
    assert worker.payout == "0x" + "a1" * 20


def test_the_planner_gets_its_part_of_the_policy(tmp_path: Path) -> None:
    path = network_file(tmp_path, "policy: {kv: {promised_sequences: 3, tokens_per_sequence: 100}}")

    plan_policy = load_network(path).policy.plan_policy()

    assert plan_policy.promised_sequences == 3
    assert plan_policy.tokens_per_sequence == 100
    assert plan_policy.fetch_bytes_per_s == 100 * MIB
    engine = load_network(path).policy.engine
    assert plan_policy.activation_tokens >= engine.prefill_chunk_tokens


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("policy: {prise: {}}", "policy.prise"),
        ("policy: {price: {platform_percnt: 5}}", "policy.price.platform_percnt"),
        ("policy: {price: {platform_percent: 101}}", "policy.price.platform_percent"),
        ("policy: {price: null}", "policy.price"),
        ("policy: {heartbeat: {dead_s: .inf}}", "policy.heartbeat.dead_s"),
        ("polizy: {}", "polizy"),
        (WORKER.replace("4MiB", "1000"), "workers.0.vram"),
        (WORKER.replace("4MiB", "lots"), "workers.0.vram"),
        (WORKER.replace("0x", "1x"), "workers.0.payout"),
        (WORKER.replace("ada", "a b"), "workers.0.name"),
    ],
)
def test_the_error_for_a_bad_key_names_the_key_and_its_file(tmp_path: Path, text: str, key: str) -> None:
    path = network_file(tmp_path, text)

    with pytest.raises(ConfigurationError) as refused:
        load_network(path)

    assert str(path) in refused.value.message
    assert key in refused.value.message


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\0"])
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"network\.yaml"):
        load_network(network_file(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        load_network(tmp_path / "nowhere.yaml")
