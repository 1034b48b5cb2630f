"""Decide which tensor of a checkpoint goes into which shard."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from azu.errors import BrokenCheckpoint, UnsupportedModel
from azu.models.checkpoint import INDEX_FILE, SINGLE_FILE, StoredTensor, read_checkpoint, read_range
from azu.models.compat import TargetParameter, refuse_incomplete, target_parameters
from azu.models.config_json import read_config
from azu.models.description import Architecture
from azu.models.skeleton import build_skeleton, named_embeddings
from azu.protocol.structure import EMBED, HEAD, LayerKind, Shard, TensorInfo

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class TensorRange:
    """One tensor of a shard, and the range of the source's file that it is made from.

    `offset` and `source_bytes` count bytes of that file; `dtype` is the serving dtype.
    """

    source: StoredTensor
    dtype: str
    shape: tuple[int, ...]
    offset: int
    source_bytes: int

    @property
    def num_values(self) -> int:
        """Number of values in the tensor."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Size in the serving dtype."""
        return self.num_values * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A shard before it is written; `ranges` are in the order of the shard's file."""

    name: str
    ranges: tuple[TensorRange, ...]
    active_parameters: int

    @property
    def weight_bytes(self) -> int:
        """Size of the tensors alone."""
        return sum(one.size_bytes for one in self.ranges)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors' entries in structure.json."""
        return {one.source.name: TensorInfo(one.dtype, one.shape) for one in self.ranges}

    def describes(self, shard: Shard) -> bool:
        """Return whether a shard that was written before is the one that this plan would write."""
        return (shard.tensors, shard.active_parameters) == (self.tensors, self.active_parameters)


def plan_shards(source: Path, architecture: Architecture) -> tuple[tuple[ShardPlan, ...], bool]:
    """Return the shards of a checkpoint in the order they are written, and whether its head is tied.

    Raises BrokenCheckpoint or UnsupportedModel when the checkpoint does not hold the whole model.
    """
    model = build_skeleton(read_config(source))
    stored = read_checkpoint(source)
    kept = _drop_tied_copies(stored, target_parameters(model, stored), model.all_tied_weights_keys)
    tables = {f"{name}.weight" for name, _ in named_embeddings(model)}
    tied_parameters = sum(model.get_parameter(owner).numel() for owner in kept.tied.values())
    refuse_incomplete(model, stored, SINGLE_FILE if (source / SINGLE_FILE).exists() else INDEX_FILE)
    plans = _lay_out(kept.tensors, kept.targets, architecture, tied_parameters=tied_parameters, tables=tables)
    return plans, bool(kept.tied)


@dataclass(frozen=True, slots=True)
class DeduplicatedTensors:
    """A checkpoint's tensors without the copies of tied weights, and the parameter of each.

    `tied` maps each parameter that has no tensor of its own to the parameter whose tensor it shares.
    """

    tensors: dict[str, StoredTensor]
    targets: dict[str, TargetParameter]
    tied: dict[str, str]


def _drop_tied_copies(
    tensors: Mapping[str, StoredTensor], targets: Mapping[str, TargetParameter], ties: Mapping[str, str]
) -> DeduplicatedTensors:
    """Keep one tensor per tied weight, under its owner's name; `ties` maps a parameter to its owner.

    As in transformers, two tensors that differ are not tied, whatever the config says. A checkpoint may hold
    a tied weight only under the name of the parameter that does not own it.
    """
    result = DeduplicatedTensors(dict(tensors), dict(targets), {})
    names = {target.parameter: name for name, target in targets.items()}
    for parameter, owner in ties.items():
        copy, original = names.get(parameter), names.get(owner)
        if copy is not None and original is not None and not _are_equal(tensors[copy], tensors[original]):
            continue
        result.tied[parameter] = owner
        if copy is None:
            continue
        del result.tensors[copy]
        target = result.targets.pop(copy)
        if original is None:
            result.tensors[owner] = replace(tensors[copy], name=owner)
            result.targets[owner] = replace(target, parameter=owner)
    return result


def _are_equal(left: StoredTensor, right: StoredTensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    chunks = (read_range(tensor, tensor.offset, tensor.size_bytes) for tensor in (left, right))
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(*chunks, strict=True))


def _lay_out(
    tensors: Mapping[str, StoredTensor],
    targets: Mapping[str, TargetParameter],
    architecture: Architecture,
    *,
    tied_parameters: int,
    tables: Collection[str],
) -> tuple[ShardPlan, ...]:
    """Return the shards in the order they are written: embed, the layers, head.

    `tied_parameters` is the size of a head weight that is stored in the embed shard. `tables` names the
    parameters that are embedding tables: a token uses one row of each.
    Raises UnsupportedModel for a tensor that has no shard, BrokenCheckpoint for a missing tensor.
    """
    ranges: dict[str, list[TensorRange]] = {name: [] for name in _shard_names(architecture)}
    active = dict.fromkeys(ranges, 0)
    for name, target in targets.items():
        for shard, part in _parts(tensors[name], target, architecture):
            if shard not in ranges:
                raise BrokenCheckpoint(f"{name!r} belongs to {shard}, which config.json does not have")
            ranges[shard].append(part)
            is_row = shard == EMBED and target.parameter in tables and len(part.shape) > 1
            active[shard] += math.prod(part.shape[1:]) if is_row else part.num_values
    active[HEAD] += tied_parameters
    for shard, content in ranges.items():
        # A tied head after layers that need no final norm has no tensor of its own.
        if not content and shard != HEAD:
            raise BrokenCheckpoint(f"the checkpoint has no tensor for {shard}")
    return tuple(
        ShardPlan(name, tuple(sorted(content, key=_file_order)), active[name])
        for name, content in ranges.items()
    )


def _shard_names(architecture: Architecture) -> Iterable[str]:
    yield EMBED
    for layer in architecture.layers:
        if layer.kind is LayerKind.DENSE:
            yield f"layer_{layer.index}_dense"
        else:
            yield f"layer_{layer.index}_router"
            yield from (f"layer_{layer.index}_expert_{expert}" for expert in range(layer.num_experts))
    yield HEAD


def _parts(
    tensor: StoredTensor, target: TargetParameter, architecture: Architecture
) -> Iterable[tuple[str, TensorRange]]:
    """Yield each shard that a tensor goes into, with the range of the tensor that it takes."""
    path = target.parameter.split(".")
    layers = architecture.layers_path.split(".")
    whole = _whole(tensor, target.dtype)
    if path[: len(layers)] != layers:
        yield from ((shard, whole) for shard in _edge_shards(path, layers[:-1], architecture))
        return
    layer = architecture.layers[int(path[len(layers)])]
    if layer.kind is LayerKind.DENSE:
        yield f"layer_{layer.index}_dense", whole
    elif "experts" not in path:
        yield f"layer_{layer.index}_router", whole
    elif (match := _EXPERT.search(tensor.name)) is not None:
        yield f"layer_{layer.index}_expert_{int(match[1])}", whole
    elif tensor.shape[:1] == (layer.num_experts,):
        for expert in range(layer.num_experts):
            yield f"layer_{layer.index}_expert_{expert}", _row(tensor, target.dtype, expert)
    else:
        raise UnsupportedModel(f"{tensor.name!r} holds all experts but not one after the other")


def _edge_shards(path: list[str], decoder: list[str], architecture: Architecture) -> Iterable[str]:
    """Yield the shards of a tensor outside the layers: a module that runs at both ends goes into both."""
    if any(path[: len(unused)] == unused for unused in (one.split(".") for one in architecture.unused)):
        return
    if path[: len(decoder)] != decoder:
        yield HEAD
        return
    child = path[len(decoder)]
    if child not in architecture.front | architecture.back:
        raise UnsupportedModel(f"{'.'.join(path)!r} runs neither before nor after the layers")
    if child in architecture.front:
        yield EMBED
    if child in architecture.back:
        yield HEAD


def _whole(tensor: StoredTensor, dtype: str) -> TensorRange:
    return TensorRange(tensor, _checked_dtype(tensor, dtype), tensor.shape, tensor.offset, tensor.size_bytes)


def _row(tensor: StoredTensor, dtype: str, index: int) -> TensorRange:
    size = tensor.size_bytes // tensor.shape[0]
    shape = (1, *tensor.shape[1:])
    return TensorRange(tensor, _checked_dtype(tensor, dtype), shape, tensor.offset + index * size, size)


def _checked_dtype(tensor: StoredTensor, dtype: str) -> str:
    """Return the dtype that a tensor is served in: `dtype` for floats, its own for integers."""
    if tensor.dtype not in _DTYPE_BYTES:
        raise UnsupportedModel(
            f"{tensor.file}: {tensor.name!r} is stored as {tensor.dtype}, which azu does not serve"
        )
    if (tensor.dtype in FLOATS) != (dtype in FLOATS):
        raise BrokenCheckpoint(f"{tensor.file}: {tensor.name!r} is {tensor.dtype} where {dtype} belongs")
    return dtype if tensor.dtype in FLOATS else tensor.dtype


def _file_order(part: TensorRange) -> tuple[int, str]:
    # Wide values come first, as in safetensors' own files, so that each tensor of a mapped file is aligned.
    return -_DTYPE_BYTES[part.dtype], part.source.name
