"""How many bytes each piece of a model takes on a node, and how long a node takes to run it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node
from azu.protocol.structure import LayerKind, Structure
from azu.units import MIB

# Bytes of one value while it is computed with, and how many rows of hidden size a layer keeps at once.
_COMPUTE_BYTES = 4
_LIVE_ROWS = 8


def whole_mib(size_bytes: float) -> int:
    """Round up to MiB: the unit in which Ray hands VRAM out."""
    return -(-int(np.ceil(size_bytes)) // MIB) * MIB


@dataclass(frozen=True, slots=True)
class Demand:
    """A model under a policy. Arrays are indexed by layer; sums of a span are differences of `*_sums`.

    `layer_bytes` counts a layer's weights without its experts, and its KV.
    """

    structure: Structure
    policy: PlanPolicy
    weight_sums: NDArray[np.int64]
    kv_sums: NDArray[np.int64]
    active_sums: NDArray[np.int64]
    expert_bytes: tuple[int, ...]
    num_experts: tuple[int, ...]
    embed_bytes: int
    head_bytes: int
    activation_bytes: int

    @classmethod
    def of(cls, structure: Structure, policy: PlanPolicy) -> "Demand":
        """Read a structure once."""
        layers = structure.layers
        tokens = policy.num_blocks * policy.block_size
        weights = [structure.layer_shard(layer.index).weight_bytes for layer in layers]
        # A node is sized for the largest expert of a layer; they are all alike in practice.
        experts = [
            max(structure.expert_shard(layer.index, e).weight_bytes for e in range(layer.num_experts))
            if layer.kind is LayerKind.MOE
            else 0
            for layer in layers
        ]
        edges = {shard.name: shard for shard in structure.edge_shards(0, structure.num_layers)}
        head = sum(shard.weight_bytes for shard in structure.edge_shards(1, structure.num_layers))
        active = [_active_bytes(structure, layer.index) for layer in layers]
        active[0] += edges["embed"].active_parameters * structure.dtype_bytes
        active[-1] += edges["head"].active_parameters * structure.dtype_bytes
        return cls(
            structure=structure,
            policy=policy,
            weight_sums=_sums(weights),
            kv_sums=_sums([layer.kv_bytes_per_token * tokens for layer in layers]),
            active_sums=_sums(active),
            expert_bytes=tuple(experts),
            num_experts=tuple(layer.num_experts for layer in layers),
            embed_bytes=edges["embed"].weight_bytes,
            head_bytes=head,
            activation_bytes=policy.activation_tokens * structure.hidden_size * _LIVE_ROWS * _COMPUTE_BYTES,
        )

    def span_bytes(self, beside: int) -> NDArray[np.int64]:
        """Return [start, end] -> bytes of a stage that keeps up to `beside` experts of each layer.

        Entries with end <= start are meaningless.
        """
        local = _sums(
            [min(beside, n) * size for n, size in zip(self.num_experts, self.expert_bytes, strict=True)]
        )
        weights = _spans(self.weight_sums + local)
        weights[0, :] += self.embed_bytes
        weights[:, -1] += self.head_bytes
        if self.structure.tied_head:
            # One stage that holds both ends maps the shared embedding once.
            weights[0, -1] -= self.embed_bytes
        room = weights * (1 + self.policy.margin_fraction) + _spans(self.kv_sums)
        room = room + self.policy.margin_bytes + self.activation_bytes
        whole: NDArray[np.int64] = (np.ceil(room / MIB) * MIB).astype(np.int64)
        return whole

    def expert_set_bytes(self, counts: Mapping[int, int]) -> int:
        """Return the bytes of an expert set that holds `counts[layer]` experts of each layer."""
        weights = sum(count * self.expert_bytes[layer] for layer, count in counts.items())
        margin = self.policy.margin_bytes + weights * self.policy.margin_fraction
        return whole_mib(weights + margin + self.activation_bytes)

    def seconds_per_byte(self, node: Node, batch_size: int) -> float:
        """Return a node's time per active weight byte: read once a step, multiplied for each sequence."""
        parameters_per_byte = 1 / self.structure.dtype_bytes
        return 1 / rounded(node.memory_bytes_per_s) + (
            2 * parameters_per_byte * batch_size / rounded(node.flops_per_s)
        )


def rounded(speed: float) -> float:
    """Round a measured speed to two digits: the third is noise, and must not outweigh a cached shard."""
    return float(f"{speed:.1e}")


def _active_bytes(structure: Structure, layer: int) -> int:
    active = structure.layer_shard(layer).active_parameters
    info = structure.layers[layer]
    if info.kind is LayerKind.MOE:
        active += info.experts_per_token * structure.expert_shard(layer, 0).active_parameters
    return active * structure.dtype_bytes


def _sums(values: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])


def _spans(sums: NDArray[np.int64]) -> NDArray[np.int64]:
    return sums[None, :] - sums[:, None]
