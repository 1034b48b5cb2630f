"""More of the same where nodes allow: several pipelines of one model, hot experts on several nodes."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count

import numpy as np

from azu.errors import InsufficientCapacity
from azu.planner.demand import Demand
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.planner.pool import Pool
from azu.planner.replan import replan
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Topology

Heat = Mapping[tuple[int, int], float]  # (layer, expert) -> its part of the work


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
    another: Topology,
    others: Iterable[tuple[Structure, Topology]],
    nodes: Sequence[Node],
    policy: PlanPolicy,
) -> bool:
    """Return whether a pipeline would take the room in which what others lose with a node comes up again."""
    used = another.vram_bytes_by_node
    left = [replace(one, vram_free_bytes=one.vram_free_bytes - used.get(one.node_id, 0)) for one in nodes]
    return any(
        _replaceable(structure, topology, nodes, policy) > _replaceable(structure, topology, left, policy)
        for structure, topology in others
    )


def with_hot_replicas(
    structure: Structure, topology: Topology, nodes: Sequence[Node], policy: PlanPolicy, heat: Heat
) -> Topology:
    """Return the topology with the hottest experts that are apart from their router held a second time.

    `nodes` have the room that is left beside the topology. An expert is as hot as the part of its layer's
    tokens that it takes; those without heat get no replica. Replicas go to nodes that hold a set already,
    then to the fastest with room; ties go to the lower id.
    """
    sets = _Sets(Demand.of(structure, policy), topology, nodes)
    apart = {
        (layer, expert)
        for chosen in topology.expert_sets
        for layer, ids in chosen.experts.items()
        for expert in ids
    }
    for layer, expert in sorted(apart & heat.keys(), key=lambda one: (-heat[one], one)):
        if heat[layer, expert] > 0:
            sets.hold_again(layer, expert)
    return replace(topology, expert_sets=sets.expert_sets())


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


class _Sets:
    """Expert sets by node, and the room beside them."""

    def __init__(self, demand: Demand, topology: Topology, nodes: Sequence[Node]) -> None:
        self._demand = demand
        self._topology = topology
        self._pool = Pool.of(nodes, demand)
        self._held: dict[str, dict[int, tuple[int, ...]]] = {}
        for chosen in topology.expert_sets:
            self._held.setdefault(chosen.node_id, {}).update(chosen.experts)
        self._taken = {node_id: demand.expert_set_vram_bytes(held) for node_id, held in self._held.items()}

    def hold_again(self, layer: int, expert: int) -> None:
        """Put one more copy of an expert where it fits best; nowhere when it fits nowhere."""
        is_new = np.array([node.node_id not in self._held for node in self._pool.nodes])
        for index in np.lexsort((self._pool.seconds_per_byte, is_new)):
            node_id = self._pool.nodes[index].node_id
            grown = self._with(node_id, layer, expert)
            if grown is None:
                continue
            added = self._demand.expert_set_vram_bytes(grown) - self._taken.get(node_id, 0)
            if added <= self._pool.room_bytes[index]:
                self._held[node_id] = grown
                self._taken[node_id] = self._taken.get(node_id, 0) + added
                self._pool.room_bytes[index] -= added
                return

    def expert_sets(self) -> tuple[ExpertSet, ...]:
        """Return the sets; those that were there keep their index."""
        before = {chosen.node_id: chosen.index for chosen in self._topology.expert_sets}
        known = sorted(self._held, key=lambda node_id: (before.get(node_id, len(before)), node_id))
        return tuple(
            ExpertSet(index, node_id, self._held[node_id], self._taken[node_id])
            for index, node_id in enumerate(known)
        )

    def _with(self, node_id: str, layer: int, expert: int) -> dict[int, tuple[int, ...]] | None:
        """Return what a node would hold with one more expert; None when it has it or its router."""
        held = self._held.get(node_id, {})
        if expert in held.get(layer, ()) or self._topology.stage_of(layer).node_id == node_id:
            return None
        return held | {layer: tuple(sorted((*held.get(layer, ()), expert)))}
