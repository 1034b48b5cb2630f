"""Nodes report their memory, speed and links; a silent node becomes suspect."""

import os
import signal
import time
from collections.abc import Callable

import httpx
import pytest
import ray

from actors.links import find
from actors.placement import SCHEDULER
from azu.launch.local_network import LocalNetwork
from azu.protocol.node import Node, NodeState
from azu.units import MIB
from tests.network.actors import actors_named, lend, pid_of
from tests.network.user import User

pytestmark = pytest.mark.cluster

Nodes = dict[str, Node]


def nodes() -> Nodes:
    """Return the scheduler's nodes by name."""
    return {node.name: node for node in ray.get(find(SCHEDULER).nodes.remote(), timeout=30)}


def wait_for(condition: Callable[[Nodes], bool], timeout_s: float) -> None:
    """Wait until a condition holds for the nodes."""
    deadline_s = time.monotonic() + timeout_s
    while not condition(found := nodes()):
        assert time.monotonic() < deadline_s, found
        time.sleep(0.1)


def agent(name: str) -> ray.actor.ActorHandle:
    (found,) = actors_named(f"node:{name}:")
    return found


def agent_pid(name: str) -> int:
    return pid_of(agent(name))


def test_every_node_reports_its_memory_speed_shards_and_links(user: User, network: LocalNetwork) -> None:
    wait_for(lambda found: sum(len(node.links_s) for node in found.values()) >= 3, timeout_s=30)
    found = nodes()

    assert {node.state for node in found.values()} == {NodeState.ALIVE}
    assert all(node.memory_bytes_per_s > 0 and node.flops_per_s > 0 for node in found.values())
    assert all(0 <= node.load <= 1 for node in found.values())
    assert all(link > 0 for node in found.values() for link in node.links_s.values())

    shown = user.http.get("/v1/network").raise_for_status().json()
    holders = {piece["node"] for model in shown["deployments"] for piece in model["topology"]}
    lines = {line["name"]: line for line in shown["nodes"]}
    assert holders
    for name in holders:
        # A piece's process holds its code and at least some weights.
        assert lines[name]["vram_used_bytes"] > 20 * MIB
        assert lines[name]["cached_shards"] > 0


def epochs_on(user: User, name: str) -> dict[str, int]:
    """Return the epoch of each model that has a piece on a node."""
    shown = user.http.get("/v1/network").raise_for_status().json()
    return {
        model["model_id"]: model["epoch"]
        for model in shown["deployments"]
        if name in {piece["node"] for piece in model["topology"]}
    }


def test_a_smaller_budget_is_reported_and_pieces_shrink_or_move(user: User, network: LocalNetwork) -> None:
    before = nodes()["ada"].vram_total_bytes
    epochs = epochs_on(user, "ada")
    try:
        lend(agent("ada"), before // 2)
        wait_for(lambda found: found["ada"].vram_total_bytes == before // 2, timeout_s=60)
        # Pieces that filled the node run with fewer blocks, or elsewhere: under a new epoch.
        wait_for(lambda _: epochs_on(user, "ada") != epochs, timeout_s=60)
    finally:
        lend(agent("ada"), 2**60)
    wait_for(lambda found: found["ada"].vram_total_bytes == before, timeout_s=60)


@pytest.mark.prove
def test_a_paused_node_gives_its_pieces_away_until_it_resumes(user: User, network: LocalNetwork) -> None:
    def as_admin(order: str) -> dict[str, object]:
        headers = {"authorization": f"Bearer {network.admin_key}"}
        answer = httpx.post(f"{network.url}/v1/nodes/ben/{order}", headers=headers, timeout=30)
        body: dict[str, object] = answer.raise_for_status().json()
        return body

    assert user.http.post("/v1/nodes/ben/pause").status_code == 404, "it is not this user's"
    try:
        wait_for(lambda _: as_admin("pause") == {"name": "ben", "paused": True, "empty": True}, timeout_s=60)
        wait_for(lambda found: found["ben"].state is NodeState.PAUSED, timeout_s=30)
        assert epochs_on(user, "ben") == {}
        shown = {one["name"]: one for one in user.http.get("/v1/network").json()["nodes"]}
        assert shown["ben"]["why_paused"] == "its owner paused it"
    finally:
        assert as_admin("resume")["paused"] is False
    wait_for(lambda found: found["ben"].state is NodeState.ALIVE, timeout_s=30)


@pytest.mark.prove
def test_a_frozen_node_becomes_suspect_while_the_others_stay_alive(network: LocalNetwork) -> None:
    pid = agent_pid("ben")
    seen: set[NodeState] = set()

    def is_suspect(found: Nodes) -> bool:
        seen.update(node.state for name, node in found.items() if name != "ben")
        return found["ben"].state is NodeState.SUSPECT

    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(is_suspect, timeout_s=60)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert seen == {NodeState.ALIVE}
    wait_for(lambda found: found["ben"].state is NodeState.ALIVE, timeout_s=60)


def test_an_agent_that_is_killed_is_started_again(network: LocalNetwork) -> None:
    pid = agent_pid("cleo")
    os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 30
    while True:
        try:
            if agent_pid("cleo") != pid:
                break
        except (ray.exceptions.RayActorError, ValueError):
            pass  # the new agent is not there yet
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    wait_for(lambda found: found["cleo"].state is NodeState.ALIVE, timeout_s=30)
