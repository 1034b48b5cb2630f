"""Which node activated how many parameter bytes for a sequence, layer by layer: what its fee is divided by.

A token counts for a layer once, when it first runs through it. The last token of a completion is delivered
but never runs, so prompt + completion - 1 tokens count where prompt + completion are charged: shares are
divided in proportion to what ran.
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

    def move(self, topology: Topology) -> None:
        """Count what runs from now on where it is now; whoever ran something before keeps that."""
        for sequence_id in list(self._tokens):
            self._count(sequence_id)
        self._topology = topology
        self._fixed = _fixed_bytes_by_layer(self._structure, topology)

    def presumed(self, prompt_tokens: int, completion_tokens: int) -> Work:
        """Return the work of a completion whose record is lost, as if all had been done where things are now.

        Of experts that are apart from their router each counts as chosen as often as any other.
        """
        num_tokens = prompt_tokens + completion_tokens - 1 if completion_tokens else 0
        return {
            layer.index: {
                node_id: activated * num_tokens
                for node_id, activated in _presumed_bytes(self._structure, self._topology, layer).items()
            }
            for layer in self._structure.layers
        }

    def ran(self, sequence_id: int, num_tokens: int) -> None:
        """Count tokens that ran through all layers for the first time."""
        self._tokens[sequence_id] += num_tokens

    def reported(self, work: Iterable[ExpertWork]) -> None:
        """Count what stages report of layers whose experts are spread."""
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
        """Add what a sequence's tokens activated whatever the routers chose."""
        num_tokens = self._tokens.pop(sequence_id, 0)
        if not num_tokens:
            return
        counted = self._counted.setdefault(sequence_id, defaultdict(int))
        for layer, (node_id, activated) in self._fixed.items():
            if activated:
                counted[layer, node_id] += activated * num_tokens


def is_spread(layer: Layer, stage: Stage) -> bool:
    """Say whether some experts of a layer are apart from its router."""
    return layer.kind is LayerKind.MOE and len(stage.experts.get(layer.index, ())) < layer.num_experts


def _fixed_bytes_by_layer(structure: Structure, topology: Topology) -> Mapping[int, tuple[str, int]]:
    """Return layer -> the stage's node and the bytes it activates per token, whatever the router chooses."""
    return {
        layer.index: (stage.node_id, _fixed_bytes(structure, layer, stage))
        for stage in topology.stages
        for layer in structure.layers[stage.span.start : stage.span.end]
    }


def _presumed_bytes(structure: Structure, topology: Topology, layer: Layer) -> Mapping[str, int]:
    """Return node id -> the bytes that it activates per token of a layer, on average."""
    stage = topology.stage_of(layer.index)
    presumed = {stage.node_id: _fixed_bytes(structure, layer, stage)}
    if not is_spread(layer, stage):
        return presumed
    presumed[stage.node_id] += structure.layer_shard(layer.index).active_parameters * structure.dtype_bytes
    chosen = layer.experts_per_token * structure.expert_shard(layer.index, 0).active_parameters
    holders = [(one.node_id, one.experts) for one in topology.expert_sets if not one.is_replica]
    for node_id, experts in (*holders, (stage.node_id, stage.experts)):
        held = len(experts.get(layer.index, ()))
        activated = chosen * structure.dtype_bytes * held // layer.num_experts
        presumed[node_id] = presumed.get(node_id, 0) + activated
    return presumed


def _fixed_bytes(structure: Structure, layer: Layer, stage: Stage) -> int:
    parameters = 0
    if layer.index == 0:
        parameters += structure.shard(EMBED).active_parameters
    if layer.index == structure.num_layers - 1:
        parameters += structure.shard(HEAD).active_parameters
    if not is_spread(layer, stage):
        parameters += structure.layer_shard(layer.index).active_parameters
        if layer.experts_per_token:
            parameters += layer.experts_per_token * structure.expert_shard(layer.index, 0).active_parameters
    return parameters * structure.dtype_bytes
