"""The bytes that each piece of a model takes on a node, and the bytes that one token uses."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from azu.planner.policy import PlanPolicy
from azu.protocol.structure import EMBED, HEAD, LayerKind, Shard, Structure
from azu.protocol.topology import LayerSpan, Piece, Stage
from azu.units import MIB

Bytes = NDArray[np.int64]

# Activations are float32 at worst. A layer keeps about this many rows of hidden size at once, and this many
# rows as wide as its widest matrix.
_COMPUTE_BYTES = 4
_HIDDEN_ROWS = 8
_WIDE_ROWS = 2


@dataclass(frozen=True, slots=True)
class MemoryDemand:
    """The memory of a model under a policy, in bytes that include the policy's margin on weights.

    `stage_bytes[start, end]` is the size of a stage of layers [start, end) without any expert,
    `expert_bytes[layer]` the size of one expert of a layer (0 for a dense layer). `active_sums` are running
    sums over layers of the weight bytes that one token uses.
    """

    structure: Structure
    policy: PlanPolicy
    stage_bytes: Bytes
    expert_bytes: tuple[int, ...]
    num_experts: tuple[int, ...]
    active_sums: Bytes
    expert_set_overhead_bytes: int

    @classmethod
    def of(cls, structure: Structure, policy: PlanPolicy) -> "MemoryDemand":
        """Compute the demand of a model."""
        # The largest expert of a layer counts; in practice all have the same size.
        experts = [
            max(_padded(shard, policy) for shard in _experts(structure, layer.index))
            if layer.kind is LayerKind.MOE
            else 0
            for layer in structure.layers
        ]
        num_experts = [layer.num_experts for layer in structure.layers]
        activation = policy.activation_tokens * _activation_values(structure) * _COMPUTE_BYTES
        return cls(
            structure=structure,
            policy=policy,
            stage_bytes=_stage_bytes(structure, policy) + activation + policy.margin_bytes,
            expert_bytes=tuple(experts),
            num_experts=tuple(num_experts),
            active_sums=_active_sums(structure),
            expert_set_overhead_bytes=activation + policy.margin_bytes,
        )

    def all_experts(self, span: LayerSpan) -> dict[int, tuple[int, ...]]:
        """Return layer -> all its experts, for the MoE layers of a span."""
        layers = range(span.start, span.end)
        return {layer: tuple(range(self.num_experts[layer])) for layer in layers if self.num_experts[layer]}

    def stage_vram_bytes(self, span: LayerSpan, beside: Mapping[int, tuple[int, ...]]) -> int:
        """Return the VRAM of a stage with the experts beside its routers, in whole MiB."""
        return _whole_mib(int(self.stage_bytes[span.start, span.end]) + self.experts_bytes(beside))

    def expert_set_vram_bytes(self, experts: Mapping[int, tuple[int, ...]]) -> int:
        """Return the VRAM of a set of experts, in whole MiB."""
        return _whole_mib(self.expert_set_overhead_bytes + self.experts_bytes(experts))

    def experts_bytes(self, experts: Mapping[int, tuple[int, ...]]) -> int:
        """Return the size of some experts, without the overhead of their set."""
        return sum(len(ids) * self.expert_bytes[layer] for layer, ids in experts.items())


def _stage_bytes(structure: Structure, policy: PlanPolicy) -> Bytes:
    """Return [start, end] -> weights and KV of a stage without experts; meaningless where end <= start."""
    tokens = policy.num_blocks * policy.block_size
    layers = [
        _padded(structure.layer_shard(layer.index), policy) + layer.kv_bytes_per_token * tokens
        for layer in structure.layers
    ]
    spans = span_sums(running_sums(layers))
    embed = _padded(structure.shard(EMBED), policy)
    spans[0, :] += embed
    spans[:, -1] += sum(
        _padded(shard, policy) for shard in structure.edge_shards(structure.num_layers, structure.num_layers)
    )
    # The last stage holds the logits of each promised sequence, and the sampler holds a copy.
    spans[:, -1] += 2 * policy.promised_sequences * structure.vocab_size * _COMPUTE_BYTES
    if structure.tied_head:
        # A stage that holds both ends maps the shared embedding once.
        spans[0, -1] -= embed
    return spans


def _active_sums(structure: Structure) -> Bytes:
    """Return running sums of the bytes one token uses; the edges count to the first and the last layer."""
    active = []
    for layer in structure.layers:
        parameters = structure.layer_shard(layer.index).active_parameters
        if layer.kind is LayerKind.MOE:
            parameters += layer.experts_per_token * structure.expert_shard(layer.index, 0).active_parameters
        active.append(parameters)
    active[0] += structure.shard(EMBED).active_parameters
    active[-1] += structure.shard(HEAD).active_parameters
    return running_sums([parameters * structure.dtype_bytes for parameters in active])


def _activation_values(structure: Structure) -> int:
    """Return the number of values that a layer keeps at once for one token."""
    shards = [structure.layer_shard(layer.index) for layer in structure.layers]
    shards += [structure.expert_shard(layer.index, 0) for layer in structure.layers if layer.num_experts]
    widths = (
        max(info.shape[-2:]) for shard in shards for info in shard.tensors.values() if len(info.shape) > 1
    )
    return _HIDDEN_ROWS * structure.hidden_size + _WIDE_ROWS * max(widths, default=0)


def _experts(structure: Structure, layer: int) -> Iterable[Shard]:
    return (structure.expert_shard(layer, e) for e in range(structure.layers[layer].num_experts))


def _padded(shard: Shard, policy: PlanPolicy) -> int:
    return ceil(shard.weight_bytes * (1 + policy.margin_fraction))


def _whole_mib(size_bytes: int) -> int:
    """Round up to the unit in which Ray assigns VRAM."""
    return -(-size_bytes // MIB) * MIB


def running_sums(values: Iterable[int]) -> Bytes:
    """Return sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0], np.cumsum(list(values), dtype=np.int64)])


def span_sums(sums: Bytes) -> Bytes:
    """Return [start, end] -> sum of a span, from running sums."""
    return sums[None, :] - sums[:, None]


def shards_of(structure: Structure, piece: Piece) -> Iterator[Shard]:
    """Yield the shards that a piece needs on its node's disk."""
    if isinstance(piece, Stage):
        yield from structure.edge_shards(piece.span.start, piece.span.end)
        yield from (structure.layer_shard(layer) for layer in range(piece.span.start, piece.span.end))
    for layer, experts in piece.experts.items():
        yield from (structure.expert_shard(layer, expert) for expert in experts)
