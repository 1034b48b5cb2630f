"""The work of a sequence: the parameter bytes that each node activated, layer by layer.

The fee of a sequence is divided in proportion to its work. Which node did it follows from the topology that
the scheduler made; of what workers say only the number of choices counts that each holder of experts served.
A token counts for a layer once, when it first runs through it. The last token of a completion is delivered
but never runs: prompt + completion - 1 tokens count, and prompt + completion tokens are charged.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping

from azu.engine.expert_counts import Difference, Holder, Received, ReportedStep
from azu.protocol.job import PLATFORM_NODE
from azu.protocol.step import ExpertWork
from azu.protocol.structure import EMBED, HEAD, Layer, LayerKind, Structure
from azu.protocol.topology import Stage, Topology

Work = Mapping[int, Mapping[str, int]]

# What was taken back of a sequence whose job was given up is not asked for.
_KEPT_SEQUENCES = 10_000


class WorkAccount:
    """Counts the work of every sequence of one deployment."""

    def __init__(self, structure: Structure, topology: Topology) -> None:
        self._structure = structure
        self._tokens: dict[int, int] = defaultdict(int)
        # sequence -> (layer, node id) -> bytes that are counted already
        self._counted: defaultdict[int, Counter[tuple[int, str]]] = defaultdict(Counter)
        # As `_counted`; the latest sequences.
        self._taken_back: defaultdict[int, Counter[tuple[int, str]]] = defaultdict(Counter)
        self._reported: list[ReportedStep] = []
        self._use(topology)

    def set_topology(self, topology: Topology) -> None:
        """Count later work for the nodes of another topology; work before this call stays with its nodes."""
        for sequence_id in list(self._tokens):
            self._count(sequence_id)
        self._use(topology)

    def estimated(self, prompt_tokens: int, completion_tokens: int) -> Work:
        """Return the work of a completion whose record is lost, as if the present nodes had done all of it.

        Distributed experts count as if all experts of a layer were chosen equally often.
        """
        num_tokens = prompt_tokens + completion_tokens - 1 if completion_tokens else 0
        return {
            layer.index: {
                node_id: activated * num_tokens
                for node_id, activated in _estimated_bytes(self._structure, self._topology, layer).items()
            }
            for layer in self._structure.layers
        }

    def add_tokens(self, sequence_id: int, num_tokens: int) -> None:
        """Count tokens that ran through all layers for the first time."""
        self._tokens[sequence_id] += num_tokens

    def add_expert_work(self, step: int, work: tuple[ExpertWork, ...], paid: Collection[int]) -> None:
        """Count what routers say of a step, for those of its sequences that are `paid`."""
        if not work:
            return
        reported = ReportedStep(step, work, frozenset(paid), self._nodes)
        self._reported.append(reported)
        for entry in work:
            key = entry.layer, self._nodes[entry.layer, entry.expert_set]
            for sequence_id in reported.paid & entry.choices.keys():
                self._counted[sequence_id][key] += self._bytes(entry, sequence_id)

    def take_reported(self) -> tuple[ReportedStep, ...]:
        """Return what routers said of each step since the last call."""
        taken, self._reported = tuple(self._reported), []
        return taken

    def compare(self, reported: ReportedStep, received: Mapping[int, Received]) -> Iterator[Difference]:
        """Take back what expert sets, by index, say otherwise than their routers; yield where they differ."""
        for found in reported.compared(received):
            yield found
            for entry in reported.work:
                if (entry.layer, entry.expert_set) != found.holder:
                    continue
                for sequence_id in reported.paid & entry.choices.keys():
                    counted = self._bytes(entry, sequence_id)
                    too_much = counted - counted * found.paid // found.said
                    taken_back = self._taken_back[sequence_id]
                    taken_back[entry.layer, reported.nodes[found.holder]] -= too_much
                    taken_back[entry.layer, PLATFORM_NODE] += too_much
            while len(self._taken_back) > _KEPT_SEQUENCES:
                del self._taken_back[next(iter(self._taken_back))]

    def taken_back(self, sequence_id: int) -> Work:
        """Return, once, by how much a sequence's work has changed since it was closed.

        What a node lost is below 0, and the platform has it.
        """
        return _by_layer(self._taken_back.pop(sequence_id, {}))

    def close(self, sequence_id: int) -> Work:
        """Return a sequence's work, layer -> node id -> activated bytes, and forget it."""
        self._count(sequence_id)
        return _by_layer(self._counted.pop(sequence_id, {}))

    def _use(self, topology: Topology) -> None:
        self._topology = topology
        self._fixed = _fixed_bytes_by_layer(self._structure, topology)
        self._nodes = _nodes_by_holder(self._structure, topology)

    def _count(self, sequence_id: int) -> None:
        """Count the bytes that a sequence's tokens activated independently of any router's choice."""
        num_tokens = self._tokens.pop(sequence_id, 0)
        if not num_tokens:
            return
        counted = self._counted[sequence_id]
        for layer, (node_id, activated) in self._fixed.items():
            if activated:
                counted[layer, node_id] += activated * num_tokens

    def _bytes(self, entry: ExpertWork, sequence_id: int) -> int:
        parameters = self._structure.expert_shard(entry.layer, 0).active_parameters
        return entry.choices[sequence_id] * parameters * self._structure.dtype_bytes


def is_distributed(layer: Layer, stage: Stage) -> bool:
    """Say whether some experts of a layer are on other nodes than its router."""
    return layer.kind is LayerKind.MOE and len(stage.experts.get(layer.index, ())) < layer.num_experts


def _by_layer(counted: Mapping[tuple[int, str], int]) -> Work:
    work: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for (layer, node_id), activated in counted.items():
        work[layer][node_id] = activated
    return dict(work)


def _nodes_by_holder(structure: Structure, topology: Topology) -> Mapping[Holder, str]:
    """Return the node of each holder of experts, for the layers with distributed experts."""
    nodes: dict[Holder, str] = {}
    for stage in topology.stages:
        for layer in structure.layers[stage.span.start : stage.span.end]:
            if is_distributed(layer, stage):
                nodes[layer.index, None] = stage.node_id
                sets = (one for one in topology.expert_sets if layer.index in one.experts)
                nodes |= {(layer.index, one.index): one.node_id for one in sets}
    return nodes


def _fixed_bytes_by_layer(structure: Structure, topology: Topology) -> Mapping[int, tuple[str, int]]:
    """Return layer -> the stage's node and the bytes per token that do not depend on the router's choice."""
    return {
        layer.index: (stage.node_id, _fixed_bytes(structure, layer, stage))
        for stage in topology.stages
        for layer in structure.layers[stage.span.start : stage.span.end]
    }


def _estimated_bytes(structure: Structure, topology: Topology, layer: Layer) -> Mapping[str, int]:
    """Return node id -> the bytes that it activates in a layer per token, on average."""
    stage = topology.stage_of(layer.index)
    estimated = {stage.node_id: _fixed_bytes(structure, layer, stage)}
    if not is_distributed(layer, stage):
        return estimated
    chosen = layer.experts_per_token * structure.expert_shard(layer.index, 0).active_parameters
    holders = [(one.node_id, one.experts) for one in topology.expert_sets if not one.is_replica]
    for node_id, experts in (*holders, (stage.node_id, stage.experts)):
        held = len(experts.get(layer.index, ()))
        activated = chosen * structure.dtype_bytes * held // layer.num_experts
        estimated[node_id] = estimated.get(node_id, 0) + activated
    return estimated


def _fixed_bytes(structure: Structure, layer: Layer, stage: Stage) -> int:
    parameters = structure.layer_shard(layer.index).active_parameters
    if layer.index == 0:
        parameters += structure.shard(EMBED).active_parameters
    if layer.index == structure.num_layers - 1:
        parameters += structure.shard(HEAD).active_parameters
    if layer.experts_per_token and not is_distributed(layer, stage):
        parameters += layer.experts_per_token * structure.expert_shard(layer.index, 0).active_parameters
    return parameters * structure.dtype_bytes
