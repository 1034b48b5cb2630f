"""Placement groups, actors and their names in Ray: the only file that names Ray's resources."""

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.compat import group_of
from azu.errors import Unavailable
from azu.protocol.node import plain_name
from azu.units import MIB

NAMESPACE = "azu"
SCHEDULER = "scheduler"
VRAM = "VRAM"
CONTROL = "control"
NODE_ID_LABEL = "ray.io/node-id"
NAME_LABEL = "azu-name"
PAYOUT_LABEL = "azu-payout"
# Ray takes no colon in a label: "cuda" stands for the one GPU that a node sees.
DEVICE_LABEL = "azu-device"
_DEVICES = {"cuda": "cuda:0", "cpu": "cpu"}
_REQUEST_TIMEOUT_S = 15.0
# One thread waits in `ping`; calls that come during a step wait for its end, and may be made again meanwhile.
_CONTROL_THREADS = 8
# The names of pieces' placement groups and actors begin so; those of pipelines' actors too.
PIECES = ("layer:", "expert:")
_OF_MODELS = (*PIECES, "pipeline:")
_HEAD = "node:__internal_head__"
# NodeDeathInfo.EXPECTED_TERMINATION: a node that got SIGTERM.
_WAS_ENDED = 1
# Ray reports what died and azu restarts it. An actor's default of one CPU does not fit a bundle of VRAM.
_ALWAYS = {"num_cpus": 0, "max_restarts": 0, "lifetime": "detached", "namespace": NAMESPACE}


@dataclass(frozen=True, slots=True)
class WorkerNode:
    """A Ray node that lends VRAM, as Ray knows it; `raylet` is where its raylet listens, "host:port"."""

    node_id: str
    name: str
    payout_address: str
    device: str
    vram_bytes: int
    raylet: str


def worker_nodes() -> tuple[tuple[WorkerNode, ...], frozenset[str]]:
    """Return the living Ray nodes that lend VRAM, and the ids of nodes that were ended and did not die."""
    nodes = ray.nodes()
    ended = (one["NodeID"] for one in nodes if not one["Alive"] and one["DeathReason"] == _WAS_ENDED)
    living = (
        WorkerNode(
            node_id=node["NodeID"],
            name=plain_name(node["Labels"].get(NAME_LABEL, node["NodeID"][:8])),
            payout_address=plain_name(node["Labels"][PAYOUT_LABEL]),
            device=_DEVICES.get(node["Labels"].get(DEVICE_LABEL, "cpu"), "cpu"),
            vram_bytes=int(node["Resources"][VRAM]) * MIB,
            raylet=f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
        )
        for node in nodes
        if node["Alive"] and node["Resources"].get(VRAM) and PAYOUT_LABEL in node["Labels"]
    )
    return tuple(living), frozenset(ended)


def start_on_head(
    cls: type, name: str, *args: Any, max_concurrency: int, has_control: bool = False
) -> ActorHandle:
    """Start an actor on the head.

    With `has_control` its CONTROL group answers while all other threads are taken. Not for a class with
    coroutines: each group would run them in an event loop of its own.
    """
    options = {**_ALWAYS, "name": name, "max_concurrency": max_concurrency, "resources": {_HEAD: 0.001}}
    actor = ray.remote(concurrency_groups={CONTROL: 1})(cls) if has_control else ray.remote(cls)
    return actor.options(**options).remote(*args)


def start_on_node(cls: type, name: str, node_id: str, *args: Any, max_concurrency: int) -> ActorHandle:
    """Start an actor on one node that takes none of its VRAM."""
    options = {
        **_ALWAYS,
        "name": name,
        # A scheduler that was started again finds the actors of the one before.
        "get_if_exists": True,
        "max_concurrency": max_concurrency,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }
    return ray.remote(cls).options(**options).remote(*args)


def start_in_group(cls: type, name: str, group: PlacementGroup, *args: Any) -> ActorHandle:
    """Start an actor that holds a piece of a model in its placement group.

    One thread runs the steps in order; the CONTROL group answers while a step computes.
    """
    options = {**_ALWAYS, "name": name, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}
    return ray.remote(concurrency_groups={CONTROL: _CONTROL_THREADS})(cls).options(**options).remote(*args)


def reserve(name: str, node_id: str, vram_bytes: int) -> PlacementGroup:
    """Begin to reserve a piece's VRAM on a node, in whole MiB; `granted` waits for it."""
    return placement_group(
        [{VRAM: -(-vram_bytes // MIB)}],
        name=name,
        lifetime="detached",
        bundle_label_selector=[{NODE_ID_LABEL: node_id}],
    )


async def granted(group: PlacementGroup, timeout_s: float) -> bool:
    """Wait for reserved VRAM; say whether the node gives it in time."""
    return await asyncio.to_thread(group.wait, timeout_s)


async def request_nodes(bundles_mib: Sequence[int]) -> None:
    """Request nodes of Ray's autoscaler that hold bundles of VRAM, existing nodes included.

    A request stands until the next; without an autoscaler it has no effect. Raises Unavailable when Ray did
    not take it.
    """
    bundles = [{VRAM: mib} for mib in bundles_mib]
    try:
        await asyncio.wait_for(asyncio.to_thread(request_resources, bundles=bundles), _REQUEST_TIMEOUT_S)
    except Exception as error:
        raise Unavailable(
            f"Ray did not take the request for {bundles}: {type(error).__name__}: {error}"
        ) from error


def release(actor: ActorHandle | None, group: PlacementGroup | None) -> None:
    """End a piece's actor and give its VRAM back; for what is gone already this does nothing."""
    try:
        if actor is not None:
            ray.kill(actor)
    finally:
        if group is not None:
            remove_placement_group(group)


def release_all() -> None:
    """End every actor and group of azu's in the cluster that this process is connected to."""
    for named in ray.util.list_named_actors(all_namespaces=True):
        if named["namespace"] == NAMESPACE:
            with suppress(ValueError):  # the actor ended meanwhile
                ray.kill(ray.get_actor(named["name"], namespace=NAMESPACE))
    _release_groups(frozenset())


def find_piece(name: str) -> tuple[ActorHandle | None, PlacementGroup | None]:
    """Return an actor and, for a piece, its placement group; each None when it is gone."""
    actor: ActorHandle | None = None
    group: PlacementGroup | None = None
    with suppress(ValueError):
        actor = ray.get_actor(name, namespace=NAMESPACE)
    with suppress(ValueError):
        group = get_placement_group(name)
    return actor, group


def sweep(kept: Collection[str]) -> frozenset[str]:
    """End every piece and pipeline except those of these names; return which of these live."""
    named = ray.util.list_named_actors(all_namespaces=True)
    ours = {one["name"] for one in named if one["namespace"] == NAMESPACE}
    living = {name for name in ours if name.startswith(_OF_MODELS)}
    for name in living.difference(kept):
        with suppress(ValueError):  # the actor ended meanwhile
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    _release_groups(kept)
    return frozenset(living.intersection(kept))


def _release_groups(kept: Collection[str]) -> None:
    for group_id, group in placement_group_table().items():
        name = group["name"]
        if group["state"] != "REMOVED" and name.startswith(PIECES) and name not in kept:
            remove_placement_group(group_of(group_id))
