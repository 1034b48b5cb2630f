"""Plan replicas where nodes have room: further pipelines of a model, and second copies of hot experts."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count

import numpy as np

from azu.errors import InsufficientCapacity
from azu.planner.demand import MemoryDemand
from azu.planner.fairness import NO_RATES, Rates, fair_plan
from azu.planner.node_pool import NodePool
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.planner.replan import replan
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Topology


def plan_pipelines(
    structure: Structure, nodes: Sequence[Node], policy: PlanPolicy, *, most: int, epoch: int = 1
) -> tuple[Topology, ...]:
    """Return up to `most` pipelines of a model that share no node, the fastest first, with ascending epochs.

    Raises InsufficientCapacity when not even one pipeline fits.
    """
    pipelines = [plan(structure, nodes, policy, epoch=epoch)]
    while len(pipelines) < most:
        another = plan_further_pipeline(structure, pipelines, nodes, policy, epoch=epoch + len(pipelines))
        if another is None:
            break
        pipelines.append(another)
    return tuple(pipelines)


def plan_further_pipeline(
    structure: Structure,
    running: Sequence[Topology],
    nodes: Sequence[Node],
    policy: PlanPolicy,
    *,
    epoch: int,
    rates: Rates = NO_RATES,
) -> Topology | None:
    """Return one more pipeline of a model, with its own replica number, on nodes that no running one uses.

    Owners come in the order of their `rates` (see `fair_plan`).
    Returns None without room for it, or when it would have less than `policy.least_replica_speed` of the
    fastest pipeline's speed: then its nodes stay free for other models.
    """
    used = {node_id for one in running for node_id in one.vram_bytes_by_node}
    try:
        unused = [node for node in nodes if node.node_id not in used]
        another = fair_plan(structure, unused, policy, rates, epoch=epoch)
    except InsufficientCapacity:
        return None
    fastest = max((one.prediction.tokens_per_s for one in running), default=0.0)
    if another.prediction.tokens_per_s < policy.least_replica_speed * fastest:
        return None
    taken = {one.replica for one in running}
    return replace(another, replica=next(number for number in count() if number not in taken))


def shared(nodes: Iterable[Node], running: Sequence[Topology]) -> list[Node]:
    """Return the nodes with the speed that is left to another pipeline beside running ones of its model."""
    found = []
    for one in nodes:
        sharing = 1 + sum(one.node_id in topology.vram_bytes_by_node for topology in running)
        found.append(
            replace(
                one,
                memory_bytes_per_s=one.memory_bytes_per_s / sharing,
                flops_per_s=one.flops_per_s / sharing,
            )
        )
    return found


def takes_spare_room(
    used: Mapping[str, int],
    others: Iterable[tuple[Structure, Topology]],
    nodes: Sequence[Node],
    policy: PlanPolicy,
) -> bool:
    """Return whether other models need the room of `used` (bytes by node) to survive the loss of a node.

    They do when, without that room, the pieces of fewer of their nodes could be placed again.
    """
    left = [replace(one, vram_free_bytes=one.vram_free_bytes - used.get(one.node_id, 0)) for one in nodes]
    return any(
        _replaceable(structure, topology, nodes, policy) > _replaceable(structure, topology, left, policy)
        for structure, topology in others
    )


def _replaceable(
    structure: Structure, topology: Topology, nodes: Sequence[Node], policy: PlanPolicy
) -> set[str]:
    """Return the nodes of a topology whose pieces would find room on other nodes."""
    found = set()
    for node_id in topology.vram_bytes_by_node:
        others = [node for node in nodes if node.node_id != node_id]
        with suppress(InsufficientCapacity):
            replan(structure, topology, topology.on_node(node_id), others, policy, epoch=topology.epoch + 1)
            found.add(node_id)
    return found


ExpertCounts = Mapping[int, Sequence[int]]  # layer -> number of times that each expert was chosen
ExpertHeat = Mapping[tuple[int, int], float]  # (layer, expert) -> its choices over the average of its layer

# An expert keeps its replica until its heat is below this fraction of `hot_expert`, because heat varies.
_COOLED = 0.5


def expert_heat(before: ExpertCounts, now: ExpertCounts, *, least_choices: int) -> ExpertHeat:
    """Return the heat of the choices between two counts, for layers with at least `least_choices` of them.

    A stage that restarted in between counts from zero.
    """
    heat = {}
    for layer, counts in now.items():
        earlier = before.get(layer, ())
        is_other = len(earlier) != len(counts)
        has_restarted = is_other or any(one < was for one, was in zip(counts, earlier, strict=True))
        chosen = counts if has_restarted else [one - was for one, was in zip(counts, earlier, strict=True)]
        if total := sum(chosen) if sum(chosen) >= least_choices else 0:
            heat.update({(layer, expert): one * len(chosen) / total for expert, one in enumerate(chosen)})
    return heat


def with_hot_replicas(
    structure: Structure, topology: Topology, nodes: Sequence[Node], policy: PlanPolicy, heat: ExpertHeat
) -> Topology:
    """Return the topology with a second copy of each hot expert that is apart from its router.

    The free bytes of `nodes` are those beside all pieces other than replicas. An expert is hot when its heat
    is at least `policy.hot_expert`. A replica without a warm expert is left out. The other replicas stay as
    they are, and new copies go into new sets, so that no piece that serves is loaded again. The hottest
    expert comes first and goes to the fastest node with room; ties go to the lower id.
    """
    warm = policy.hot_expert * _COOLED
    replicas = _Replicas(MemoryDemand.of(structure, policy), topology, nodes)
    for chosen in topology.expert_sets:
        if chosen.is_replica and any(heat.get(one, 0.0) >= warm for one in _members(chosen)):
            replicas.keep(chosen)
    apart = {one for chosen in topology.expert_sets if not chosen.is_replica for one in _members(chosen)}
    hot = [one for one in apart & heat.keys() if heat[one] >= policy.hot_expert]
    for layer, expert in sorted(hot, key=lambda one: (-heat[one], one)):
        replicas.add(layer, expert)
    without = topology.without(topology.replicas)
    return replace(without, expert_sets=(*without.expert_sets, *replicas.sets()))


def _members(chosen: ExpertSet) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, ids in chosen.experts.items() for expert in ids]


class _Replicas:
    """The replicas that stay, the new ones, and the room beside them."""

    def __init__(self, demand: MemoryDemand, topology: Topology, nodes: Sequence[Node]) -> None:
        self._demand = demand
        self._topology = topology
        self._pool = NodePool.of(nodes, demand)
        self._places = {node.node_id: place for place, node in enumerate(self._pool.nodes)}
        self._kept: list[ExpertSet] = []
        self._new: dict[str, dict[int, tuple[int, ...]]] = {}
        self._taken: dict[str, int] = {}

    def keep(self, chosen: ExpertSet) -> None:
        """Keep a replica if its node has the room."""
        place = self._places.get(chosen.node_id)
        if place is not None and chosen.vram_bytes <= self._pool.room_bytes[place]:
            self._pool.room_bytes[place] -= chosen.vram_bytes
            self._kept.append(chosen)

    def add(self, layer: int, expert: int) -> None:
        """Add a copy of an expert that has none, if it fits on a node."""
        if any((layer, expert) in _members(chosen) for chosen in self._kept):
            return
        for place in np.argsort(self._pool.seconds_per_byte, kind="stable"):
            node_id = self._pool.nodes[place].node_id
            if self._has(node_id, layer, expert):
                continue
            before = self._new.get(node_id, {})
            grown = before | {layer: tuple(sorted((*before.get(layer, ()), expert)))}
            added = self._demand.expert_set_vram_bytes(grown) - self._taken.get(node_id, 0)
            if added <= self._pool.room_bytes[place]:
                self._pool.room_bytes[place] -= added
                self._new[node_id] = grown
                self._taken[node_id] = self._taken.get(node_id, 0) + added
                return

    def sets(self) -> tuple[ExpertSet, ...]:
        """Return all replicas; those that stay keep their index."""
        used = {one.index for one in self._topology.expert_sets if not one.is_replica}
        used |= {one.index for one in self._kept}
        free = (index for index in count() if index not in used)
        new = (
            ExpertSet(next(free), node_id, experts, self._taken[node_id], is_replica=True)
            for node_id, experts in sorted(self._new.items())
        )
        return (*self._kept, *new)

    def _has(self, node_id: str, layer: int, expert: int) -> bool:
        """Return whether a node has an expert, or the router that sends to it."""
        return self._topology.stage_of(layer).node_id == node_id or any(
            chosen.node_id == node_id and expert in chosen.experts.get(layer, ())
            for chosen in self._topology.expert_sets
        )
