"""On networks of different nodes the prediction for a plan is faster than for equal numbers of layers."""

import random
from dataclasses import replace
from itertools import pairwise
from statistics import median

from azu.planner.demand import MemoryDemand
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.planner.prediction import predict
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import LayerSpan, Stage, Topology
from azu.units import GIB
from tests.builders import node, structure

POLICY = PlanPolicy(promised_sequences=4, tokens_per_sequence=2048)
# Free VRAM in GiB and memory bandwidth in bytes per second of common GPUs.
CARDS = [(6, 1.9e11), (8, 2.7e11), (12, 3.6e11), (16, 4.5e11), (24, 9.4e11), (24, 1.0e12), (32, 1.8e12)]


def heterogeneous(seed: int) -> tuple[Structure, list[Node]]:
    """Return a model of 40 layers and nodes that each hold an equal part of it."""
    draw = random.Random(seed)
    names = [f"n{index}" for index in range(draw.randint(5, 9))]
    cards = {name: draw.choice(CARDS) for name in names}
    links = {
        name: {other: draw.choice([0.0005, 0.002, 0.01]) for other in names if other > name} for name in names
    }
    nodes = [
        node(name, gib * GIB, memory_bytes_per_s=speed, flops_per_s=speed * 100, links_s=links[name])
        for name, (gib, speed) in cards.items()
    ]
    # The model is as large as equal parts on these nodes can be.
    equal_bytes = min(one.vram_free_bytes for one in nodes) * len(nodes) // 40
    return structure(40, layer_bytes=int(0.7 * equal_bytes)), nodes


def equal_split(model: Structure, nodes: list[Node]) -> Topology:
    """Return a topology with equal numbers of layers, give or take one, on the nodes in the order of ids."""
    cuts = [round(index * model.num_layers / len(nodes)) for index in range(len(nodes) + 1)]
    demand = MemoryDemand.of(model, POLICY)
    spans = [LayerSpan(start, end) for start, end in pairwise(cuts)]
    stages = tuple(
        Stage(index, one.node_id, span, {}, demand.stage_vram_bytes(span, {}))
        for index, (one, span) in enumerate(zip(nodes, spans, strict=True))
    )
    assert all(stage.vram_bytes <= one.vram_free_bytes for stage, one in zip(stages, nodes, strict=True))
    whole = plan(model, [node("whole", 1024 * GIB)], POLICY)
    return replace(whole, stages=stages)


def test_a_plan_beats_equal_splitting_on_twenty_heterogeneous_networks() -> None:
    ratios = []
    for seed in range(20):
        model, nodes = heterogeneous(seed)
        planned = plan(model, nodes, POLICY)
        equal = predict(model, equal_split(model, nodes), nodes, POLICY)
        ratios.append(planned.prediction.tokens_per_s / equal.tokens_per_s)

    assert min(ratios) > 1, ratios
    assert median(ratios) > 1.2, ratios
