"""Predict how fast a topology is on given nodes."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from azu.planner.demand import MemoryDemand
from azu.planner.node_pool import link_s, seconds_per_byte
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, Prediction, Stage, Topology


def predict(
    structure: Structure, topology: Topology, nodes: Sequence[Node], policy: PlanPolicy
) -> Prediction:
    """Return the speed of a topology on nodes as they are now; they may have changed since its plan.

    `nodes` must hold every node that the topology uses.
    """
    return predict_pieces(MemoryDemand.of(structure, policy), nodes, topology.stages, topology.expert_sets)


def predict_pieces(
    demand: MemoryDemand, nodes: Sequence[Node], stages: Sequence[Stage], expert_sets: Sequence[ExpertSet]
) -> Prediction:
    """Return the speed of placed pieces; see `predict`."""
    policy = demand.policy
    by_id = {node.node_id: node for node in nodes}
    frames_s = _frame_time_s(policy.hop_s, by_id, stages, expert_sets)

    def step_s(batch_size: int) -> float:
        return frames_s + _compute_time_s(demand, by_id, stages, batch_size)

    return Prediction(
        tokens_per_s=policy.batch_size / step_s(policy.batch_size),
        time_per_output_token_s=step_s(1),
        lamports_per_token=policy.lamports_per_token_layer * demand.structure.num_layers,
    )


def _compute_time_s(
    demand: MemoryDemand, by_id: Mapping[str, Node], stages: Sequence[Stage], batch_size: int
) -> float:
    """Return the time that layers compute; experts apart count as if they ran beside their router."""
    speeds = seconds_per_byte([by_id[stage.node_id] for stage in stages], demand, batch_size)
    sums = demand.active_sums
    return sum(
        float(sums[stage.span.end] - sums[stage.span.start]) * float(speed)
        for stage, speed in zip(stages, speeds, strict=True)
    )


def _frame_time_s(
    hop_s: float, by_id: Mapping[str, Node], stages: Sequence[Stage], expert_sets: Sequence[ExpertSet]
) -> float:
    """Return the time of all frames: into each stage and back to the pipeline, to experts and back."""
    between = sum(
        link_s(by_id[stage.node_id], by_id[after.node_id], hop_s) for stage, after in pairwise(stages)
    )
    to_experts = 0.0
    for stage in stages:
        for layer in range(stage.span.start, stage.span.end):
            holders = [by_id[chosen.node_id] for chosen in expert_sets if layer in chosen.experts]
            # A router waits for the slowest of its experts.
            to_experts += 2 * max((link_s(by_id[stage.node_id], one, hop_s) for one in holders), default=0.0)
    return 2 * hop_s + between + to_experts
