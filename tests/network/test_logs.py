"""A network's logs show one job's way through its processes, and no secret."""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import ray

from azu.launch.local_network import LocalNetwork
from tests.network.conftest import UNUSED_KEY, ledger_redis_url
from tests.network.user import User, log_in

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

_TIMEOUT_S = 20.0
MODEL = "azu/tiny-dense"


@pytest.fixture
def logs(network: LocalNetwork, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[Path, bytes]]:
    """Every file that a process of the network logs to."""
    home = tmp_path_factory.getbasetemp() / "azu0"
    # .../ray/head/session_x/logs: each node has a folder of its own beside the head's.
    head = Path(ray._private.worker._global_node.get_logs_dir_path())
    ray_folder = head.parents[2]

    def read() -> dict[Path, bytes]:
        paths = [*(home / "logs").rglob("*"), *ray_folder.glob("*/session_*/logs/**/*")]
        # A link is a second name of the session's folder.
        return {path: path.read_bytes() for path in {path.resolve() for path in paths} if path.is_file()}

    return read


def lines(logs: dict[Path, bytes]) -> list[dict[str, Any]]:
    """Return the lines that are azu's own."""
    found = []
    for content in logs.values():
        for line in content.splitlines():
            if line.startswith(b"{") and b'"process"' in line:
                found.append(json.loads(line))
    return found


def told(logs: dict[Path, bytes], job_id: str) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of each process about a job or its sequences."""
    all_lines = lines(logs)
    by_process = defaultdict(list)
    for line in all_lines:
        if line.get("job_id") == job_id:
            by_process[line["process"]].append(line)
    sequences = {line["sequence_id"] for line in by_process["pipeline"]}
    for line in all_lines:
        if line["process"] == "layer" and line["model_id"] == MODEL and line.get("sequence_id") in sequences:
            by_process["layer"].append(line)
    return by_process


def test_a_job_is_followed_through_all_its_processes(
    user: User, logs: Callable[[], dict[Path, bytes]]
) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 5, "n": 2, "ignore_eos": True}
    named = user.http.post("/v1/completions", json=body, headers={"x-request-id": "my-request"})
    job_id = named.raise_for_status().json()["azu"]["job_id"]
    user.http.get(f"/v1/receipts/{job_id}").raise_for_status()

    deadline = time.monotonic() + _TIMEOUT_S
    processes = {"ingress", "scheduler", "pipeline", "layer", "treasury"}
    while processes - (found := told(logs(), job_id)).keys():
        assert time.monotonic() < deadline, f"only {set(found)} said something of {job_id}"
        time.sleep(0.2)

    assert found["ingress"][0]["request_id"] == "my-request"
    assert found["ingress"][0]["prompt_tokens"] > 0
    assert [line["message"] for line in found["scheduler"]] == ["taken", "ended"]
    assert found["scheduler"][1]["charged_lamports"] > 0
    assert len({line["sequence_id"] for line in found["pipeline"]}) == 2
    assert {line["stage"] for line in found["layer"]} >= {0, 1}
    for line in chain.from_iterable(found.values()):
        assert {"time", "level", "logger", "message"} <= line.keys()


def test_no_log_shows_a_key_a_token_or_a_password(
    network: LocalNetwork,
    user: User,
    logs: Callable[[], dict[Path, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    user.http.get("/v1/balance").raise_for_status()
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
    user.http.post("/v1/completions", json=body).raise_for_status()
    home = tmp_path_factory.getbasetemp() / "azu0"
    secrets = {
        "the platform's key": (home / "devnet.key").read_text().removeprefix("0x"),
        "an unused private key": UNUSED_KEY,
        "the admin key": network.admin_key,
        "a user's bearer": user.api_key,
        "Ray's token": network.ticket.token,
        "the owner's password for the jobs' Redis": urlsplit(network.redis_url).password or "",
        "the owner's password for the books' Redis": urlsplit(ledger_redis_url(network)).password or "",
        "the owner's secret at the books": urlsplit(network.books_url).password or "",
    }
    read = logs()
    assert len(read) > 20
    assert len(lines(read)) > 10

    for name, secret in secrets.items():
        assert len(secret) > 20, name
        shown = [path.name for path, content in read.items() if secret.encode() in content]
        assert shown == [], f"{name} stands in {shown}"
    for path, content in read.items():
        assert b"Bearer azu" not in content, path
        assert b"azu-sk-" not in content, path
        assert b"redis://ingress:" not in content, path


def test_what_a_request_says_acts_on_no_terminal_in_any_log(
    user: User, logs: Callable[[], dict[Path, bytes]]
) -> None:
    acts = "\x1b[2J\x9b1m"
    quoted = f"{quote(acts)}marked%0aforged"
    for path in (f"/v1/jobs/{quoted}/stream", f"/results/{quoted}", f"/{quoted}", f"/v1/jobs?limit={quoted}"):
        assert 400 <= user.http.get(path).status_code < 500
    body = {"model": f"{acts}marked\nforged", "prompt": "Hello", "max_tokens": 1}
    refused = user.http.post("/v1/completions", json=body)
    assert 400 <= refused.status_code < 500
    assert not set(refused.json()["error"]["message"]) & set("\x1b\x9b\n")
    log_in(user.url, acts)

    read = logs()
    print("these logs quote requests:", [path.name for path, content in read.items() if b"marked" in content])
    for path, content in read.items():
        assert acts.encode() not in content, path
        assert b"\x1b[2J" not in content, path
        assert b"\nforged" not in content, path
