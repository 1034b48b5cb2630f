"""Which tensor of a checkpoint goes into which shard."""

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

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class TensorRange:
    """One tensor of a shard and the bytes of the checkpoint that it is made from.

    `offset` and `source_bytes` are a range of the source's file; `dtype` is the serving dtype.
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
        return self.num_values * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A shard before it is written; the pieces stand in the file's order."""

    name: str
    pieces: tuple[TensorRange, ...]
    active_parameters: int

    @property
    def weight_bytes(self) -> int:
        """Size of the tensors alone."""
        return sum(piece.size_bytes for piece in self.pieces)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What structure.json says of the tensors."""
        return {piece.source.name: TensorInfo(piece.dtype, piece.shape) for piece in self.pieces}

    def describes(self, shard: Shard) -> bool:
        """Say whether a shard that was written before is what this plan would write."""
        return (shard.tensors, shard.active_parameters) == (self.tensors, self.active_parameters)


def lay_out(
    tensors: Mapping[str, StoredTensor],
    destinations: Mapping[str, TargetParameter],
    architecture: Architecture,
    *,
    tied_parameters: int,
    tables: Collection[str],
) -> tuple[ShardPlan, ...]:
    """Return the shards in the order they are written: embed, the layers, head.

    `tied_parameters` counts a head weight that lives in the embed shard. `tables` names the parameters that
    are embedding tables, of which a token uses one row.
    Raises UnsupportedModel for a tensor that has no shard, BrokenCheckpoint for one that is not there.
    """
    pieces: dict[str, list[TensorRange]] = {name: [] for name in _shard_names(architecture)}
    used = dict.fromkeys(pieces, 0)
    for name, destination in destinations.items():
        for shard, piece in _place(tensors[name], destination, architecture):
            if shard not in pieces:
                raise BrokenCheckpoint(f"{name!r} belongs to {shard}, which config.json knows nothing of")
            pieces[shard].append(piece)
            one_row = shard == EMBED and destination.parameter in tables and len(piece.shape) > 1
            used[shard] += math.prod(piece.shape[1:]) if one_row else piece.num_values
    used[HEAD] += tied_parameters
    for shard, content in pieces.items():
        # A tied head after layers that need no final norm holds nothing of its own.
        if not content and shard != HEAD:
            raise BrokenCheckpoint(f"the checkpoint has no tensor for {shard}")
    return tuple(
        ShardPlan(name, tuple(sorted(content, key=_file_order)), used[name])
        for name, content in pieces.items()
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


def _place(
    tensor: StoredTensor, destination: TargetParameter, architecture: Architecture
) -> Iterable[tuple[str, TensorRange]]:
    path = destination.parameter.split(".")
    layers = architecture.layers_path.split(".")
    whole = _whole(tensor, destination.dtype)
    if path[: len(layers)] != layers:
        yield from ((shard, whole) for shard in _edges(path, layers[:-1], architecture))
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
            yield f"layer_{layer.index}_expert_{expert}", _slice(tensor, destination.dtype, expert)
    else:
        raise UnsupportedModel(f"{tensor.name!r} holds all experts but not one after the other")


def _edges(path: list[str], decoder: list[str], architecture: Architecture) -> Iterable[str]:
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
    return TensorRange(tensor, _served(tensor, dtype), tensor.shape, tensor.offset, tensor.size_bytes)


def _slice(tensor: StoredTensor, dtype: str, index: int) -> TensorRange:
    size = tensor.size_bytes // tensor.shape[0]
    shape = (1, *tensor.shape[1:])
    return TensorRange(tensor, _served(tensor, dtype), shape, tensor.offset + index * size, size)


def _served(tensor: StoredTensor, dtype: str) -> str:
    if tensor.dtype not in DTYPE_BYTES:
        raise UnsupportedModel(
            f"{tensor.file}: {tensor.name!r} is stored as {tensor.dtype}, which azu does not serve"
        )
    if (tensor.dtype in FLOATS) != (dtype in FLOATS):
        raise BrokenCheckpoint(f"{tensor.file}: {tensor.name!r} is {tensor.dtype} where {dtype} belongs")
    return dtype if tensor.dtype in FLOATS else tensor.dtype


def _file_order(piece: TensorRange) -> tuple[int, str]:
    # Wide values first, as safetensors does it, so that every tensor of a mapped file is aligned.
    return -DTYPE_BYTES[piece.dtype], piece.source.name


@dataclass(frozen=True, slots=True)
class DeduplicatedTensors:
    """A checkpoint's tensors without the copies of tied weights.

    `tied` holds the parameters that have no tensor of their own, each with the one they take theirs from.
    """

    tensors: dict[str, StoredTensor]
    destinations: dict[str, TargetParameter]
    tied: dict[str, str]


def drop_tied_copies(
    tensors: Mapping[str, StoredTensor], destinations: Mapping[str, TargetParameter], ties: Mapping[str, str]
) -> DeduplicatedTensors:
    """Keep one tensor per tied weight, under the owner's place; `ties` maps a parameter to its owner.

    As in transformers, two tensors that differ are not tied, whatever the config says; and a checkpoint may
    hold the weight under the other parameter's name alone.
    """
    result = DeduplicatedTensors(dict(tensors), dict(destinations), {})
    names = {destination.parameter: name for name, destination in destinations.items()}
    for parameter, owner in ties.items():
        copy, original = names.get(parameter), names.get(owner)
        if copy is not None and original is not None and not _same(tensors[copy], tensors[original]):
            continue
        result.tied[parameter] = owner
        if copy is None:
            continue
        del result.tensors[copy]
        destination = result.destinations.pop(copy)
        if original is None:
            result.tensors[owner] = replace(tensors[copy], name=owner)
            result.destinations[owner] = replace(destination, parameter=owner)
    return result


def _same(left: StoredTensor, right: StoredTensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    ranges = (read_range(tensor, tensor.offset, tensor.size_bytes) for tensor in (left, right))
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(*ranges, strict=True))


def plan_shards(source: Path, architecture: Architecture) -> tuple[tuple[ShardPlan, ...], bool]:
    """Return the shards of a checkpoint in the order they are written, and whether its head is tied.

    Raises BrokenCheckpoint or UnsupportedModel when the checkpoint does not hold the whole model.
    """
    model = build_skeleton(read_config(source))
    stored = read_checkpoint(source)
    untied = drop_tied_copies(stored, target_parameters(model, stored), model.all_tied_weights_keys)
    tables = {f"{name}.weight" for name, _ in named_embeddings(model)}
    tied_parameters = sum(model.get_parameter(owner).numel() for owner in untied.tied.values())
    where = SINGLE_FILE if (source / SINGLE_FILE).exists() else INDEX_FILE
    refuse_incomplete(model, stored, where)
    plans = lay_out(
        untied.tensors, untied.destinations, architecture, tied_parameters=tied_parameters, tables=tables
    )
    return plans, bool(untied.tied)
