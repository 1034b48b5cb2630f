"""Topology to placement groups and actors on them: the only file that names Ray's resources."""

import asyncio
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._raylet import PlacementGroupID
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

from azu.errors import InsufficientCapacity, Unavailable
from azu.units import MIB

NAMESPACE = "azu"
SCHEDULER = "scheduler"
VRAM = "VRAM"
CONTROL = "control"
NODE_ID_LABEL = "ray.io/node-id"
NAME_LABEL = "azu-name"
PAYOUT_LABEL = "azu-payout"
DEVICE_LABEL = "azu-device"
_REQUEST_TIMEOUT_S = 15.0
# One waits in `alive`; the others are for calls that end.
_CONTROL_THREADS = 3
# What the names of groups begin with that hold pieces of models, and with the pipelines' those of actors.
PIECES = ("layer:", "expert:")
_OF_MODELS = (*PIECES, "pipeline:")
_HEAD = "node:__internal_head__"
# azu restarts what died, Ray only says so. An actor's default of one CPU does not fit a bundle of VRAM.
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


def worker_nodes() -> tuple[WorkerNode, ...]:
    """Return the living Ray nodes that lend VRAM."""
    return tuple(
        WorkerNode(
            node_id=node["NodeID"],
            name=node["Labels"].get(NAME_LABEL, node["NodeID"][:8]),
            payout_address=node["Labels"][PAYOUT_LABEL],
            device=node["Labels"].get(DEVICE_LABEL, "cpu"),
            vram_bytes=int(node["Resources"][VRAM]) * MIB,
            raylet=f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get(VRAM) and PAYOUT_LABEL in node["Labels"]
    )


def actor_name(kind: str, *parts: object) -> str:
    """Return an actor's name, such as "layer:azu-tiny-dense:1:0"."""
    return ":".join([kind, *(re.sub(r"[^\w.-]", "-", str(part)) for part in parts)])


def start_on_head(cls: type, name: str, *args: Any, max_concurrency: int, **kwargs: Any) -> ActorHandle:
    """Start an actor of the control plane, which lives on the head."""
    options = {**_ALWAYS, "name": name, "max_concurrency": max_concurrency, "resources": {_HEAD: 0.001}}
    return ray.remote(cls).options(**options).remote(*args, **kwargs)


def start_on_node(cls: type, name: str, node_id: str, *args: Any, max_concurrency: int) -> ActorHandle:
    """Start an actor on one node that takes none of its VRAM."""
    options = {
        **_ALWAYS,
        "name": name,
        # A scheduler that was started again finds those of the one before.
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


async def reserve(name: str, node_id: str, vram_bytes: int, timeout_s: float) -> PlacementGroup:
    """Reserve a piece's VRAM on a node, in whole MiB.

    Raises InsufficientCapacity when the node does not give it in time.
    """
    mib = -(-vram_bytes // MIB)
    group = placement_group(
        [{VRAM: mib}],
        name=name,
        lifetime="detached",
        bundle_label_selector=[{NODE_ID_LABEL: node_id}],
    )
    try:
        is_ready = await asyncio.to_thread(group.wait, timeout_s)
    except asyncio.CancelledError:
        remove_placement_group(group)
        raise
    if not is_ready:
        remove_placement_group(group)
        raise InsufficientCapacity(f"node {node_id[:8]} did not give {mib} MiB of VRAM in {timeout_s:.0f} s")
    return group


async def request_nodes(bundles_mib: Sequence[int]) -> None:
    """Ask Ray's autoscaler for nodes that hold bundles of VRAM, all that there are included.

    The request stands until the next; where no autoscaler runs nothing comes of it. Raises an AzuError when
    it was not heard.
    """
    bundles = [{VRAM: mib} for mib in bundles_mib]
    try:
        await asyncio.wait_for(asyncio.to_thread(request_resources, bundles=bundles), _REQUEST_TIMEOUT_S)
    except Exception as error:
        raise Unavailable(f"Ray did not hear of {bundles}: {type(error).__name__}: {error}") from error


def release(actor: ActorHandle | None, group: PlacementGroup | None) -> None:
    """Take a piece down and give its VRAM back; what is gone already stays gone."""
    if actor is not None:
        ray.kill(actor)
    if group is not None:
        remove_placement_group(group)


def release_all() -> None:
    """Take down every actor and group of azu's in the cluster that this process is connected to."""
    for named in ray.util.list_named_actors(all_namespaces=True):
        if named["namespace"] == NAMESPACE:
            with suppress(ValueError):  # it ended meanwhile
                ray.kill(ray.get_actor(named["name"], namespace=NAMESPACE))
    _release_groups(frozenset())


def find_piece(name: str) -> tuple[ActorHandle | None, PlacementGroup | None]:
    """Return the actor of a piece and the group that it lies in, each None when it is gone."""
    actor: ActorHandle | None = None
    group: PlacementGroup | None = None
    with suppress(ValueError):
        actor = ray.get_actor(name, namespace=NAMESPACE)
    with suppress(ValueError):
        group = get_placement_group(name)
    return actor, group


def sweep(kept: Collection[str]) -> frozenset[str]:
    """Take down every piece and pipeline but those of these names; return which of these live."""
    named = ray.util.list_named_actors(all_namespaces=True)
    ours = {one["name"] for one in named if one["namespace"] == NAMESPACE}
    living = {name for name in ours if name.startswith(_OF_MODELS)}
    for name in living.difference(kept):
        with suppress(ValueError):  # it ended meanwhile
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    _release_groups(kept)
    return frozenset(living.intersection(kept))


def _release_groups(kept: Collection[str]) -> None:
    for group_id, group in placement_group_table().items():
        name = group["name"]
        if group["state"] != "REMOVED" and name.startswith(PIECES) and name not in kept:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))
