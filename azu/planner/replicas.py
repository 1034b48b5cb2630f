"""More of the same where nodes allow: several pipelines of one model."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count

from azu.errors import InsufficientCapacity
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.planner.replan import replan
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology


def plan_replicas(
    structure: Structure, nodes: Sequence[Node], policy: PlanPolicy, *, most: int, epoch: int = 1
) -> tuple[Topology, ...]:
    """Return up to `most` pipelines of a model that share no node, the fastest first, each with its epoch.

    Raises InsufficientCapacity when not even one fits.
    """
    pipelines = [plan(structure, nodes, policy, epoch=epoch)]
    while len(pipelines) < most:
        another = plan_another(structure, pipelines, nodes, policy, epoch=epoch + len(pipelines))
        if another is None:
            break
        pipelines.append(another)
    return tuple(pipelines)


def plan_another(
    structure: Structure,
    running: Sequence[Topology],
    nodes: Sequence[Node],
    policy: PlanPolicy,
    *,
    epoch: int,
) -> Topology | None:
    """Return one more pipeline of a model on nodes that no running one uses, under a replica of its own.

    None without room for it, or where it would be slower than `policy.least_replica_speed` of the fastest:
    that leaves its nodes to other models.
    """
    used = {node_id for one in running for node_id in one.vram_bytes_by_node}
    try:
        another = plan(structure, [node for node in nodes if node.node_id not in used], policy, epoch=epoch)
    except InsufficientCapacity:
        return None
    fastest = max((one.prediction.tokens_per_s for one in running), default=0.0)
    if another.prediction.tokens_per_s < policy.least_replica_speed * fastest:
        return None
    taken = {one.replica for one in running}
    return replace(another, replica=next(number for number in count() if number not in taken))


def takes_spare_room(
    used: Mapping[str, int],
    others: Iterable[tuple[Structure, Topology]],
    nodes: Sequence[Node],
    policy: PlanPolicy,
) -> bool:
    """Return whether bytes by node are the room in which what others lose with a node comes up again."""
    left = [replace(one, vram_free_bytes=one.vram_free_bytes - used.get(one.node_id, 0)) for one in nodes]
    return any(
        _replaceable(structure, topology, nodes, policy) > _replaceable(structure, topology, left, policy)
        for structure, topology in others
    )


def _replaceable(
    structure: Structure, topology: Topology, nodes: Sequence[Node], policy: PlanPolicy
) -> set[str]:
    """Return the nodes of a topology whose pieces would find room elsewhere."""
    found = set()
    for node_id in topology.vram_bytes_by_node:
        others = [node for node in nodes if node.node_id != node_id]
        with suppress(InsufficientCapacity):
            replan(structure, topology, topology.on_node(node_id), others, policy, epoch=topology.epoch + 1)
            found.add(node_id)
    return found
