"""The work of a sequence: the parameter bytes that each node activated, layer by layer.

The fee of a sequence is divided in proportion to its work. A token counts for a layer once, when it first
runs through it. The last token of a completion is delivered but never runs: prompt + completion - 1 tokens
count, and prompt + completion tokens are charged.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from azu.protocol.step import ExpertWork
from azu.protocol.structure import EMBED, HEAD, Layer, LayerKind, Structure
from azu.protocol.topology import Stage, Topology

Work = Mapping[int, Mapping[str, int]]


class WorkAccount:
    """Counts the work of every sequence of one deployment."""

    def __init__(self, structure: Structure, topology: Topology) -> None:
        self._structure = structure
        self._topology = topology
        self._tokens: dict[int, int] = defaultdict(int)
        # sequence -> (layer, node id) -> bytes that are counted already
        self._counted: dict[int, dict[tuple[int, str], int]] = {}
        self._fixed = _fixed_bytes_by_layer(structure, topology)

    def set_topology(self, topology: Topology) -> None:
        """Count later work for the nodes of another topology; work before this call stays with its nodes."""
        for sequence_id in list(self._tokens):
            self._count(sequence_id)
        self._topology = topology
        self._fixed = _fixed_bytes_by_layer(self._structure, topology)

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

    def add_expert_work(self, work: Iterable[ExpertWork]) -> None:
        """Count the work that stages report for layers with distributed experts."""
        for entry in work:
            counted = self._counted.setdefault(entry.sequence_id, defaultdict(int))
            counted[entry.layer, entry.node_id] += entry.activated_bytes

    def close(self, sequence_id: int) -> Work:
        """Return a sequence's work, layer -> node id -> activated bytes, and forget it."""
        self._count(sequence_id)
        counted = self._counted.pop(sequence_id, {})
        work: dict[int, dict[str, int]] = (
            {layer.index: {} for layer in self._structure.layers} if counted else {}
        )
        for (layer, node_id), activated in counted.items():
            work[layer][node_id] = activated
        return work

    def _count(self, sequence_id: int) -> None:
        """Count the bytes that a sequence's tokens activated independently of any router's choice."""
        num_tokens = self._tokens.pop(sequence_id, 0)
        if not num_tokens:
            return
        counted = self._counted.setdefault(sequence_id, defaultdict(int))
        for layer, (node_id, activated) in self._fixed.items():
            if activated:
                counted[layer, node_id] += activated * num_tokens


def _is_distributed(layer: Layer, stage: Stage) -> bool:
    """Say whether some experts of a layer are on other nodes than its router."""
    return layer.kind is LayerKind.MOE and len(stage.experts.get(layer.index, ())) < layer.num_experts


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
    if not _is_distributed(layer, stage):
        return estimated
    estimated[stage.node_id] += structure.layer_shard(layer.index).active_parameters * structure.dtype_bytes
    chosen = layer.experts_per_token * structure.expert_shard(layer.index, 0).active_parameters
    holders = [(one.node_id, one.experts) for one in topology.expert_sets if not one.is_replica]
    for node_id, experts in (*holders, (stage.node_id, stage.experts)):
        held = len(experts.get(layer.index, ()))
        activated = chosen * structure.dtype_bytes * held // layer.num_experts
        estimated[node_id] = estimated.get(node_id, 0) + activated
    return estimated


def _fixed_bytes(structure: Structure, layer: Layer, stage: Stage) -> int:
    parameters = 0
    if layer.index == 0:
        parameters += structure.shard(EMBED).active_parameters
    if layer.index == structure.num_layers - 1:
        parameters += structure.shard(HEAD).active_parameters
    if not _is_distributed(layer, stage):
        parameters += structure.layer_shard(layer.index).active_parameters
        if layer.experts_per_token:
            parameters += layer.experts_per_token * structure.expert_shard(layer.index, 0).active_parameters
    return parameters * structure.dtype_bytes
