"""Writing one shard: a stream of bytes from the checkpoint, checked, cast and hashed on its way."""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from azu.errors import BrokenCheckpoint
from azu.protocol.structure import Shard
from azu.sharding.checkpoint import read_range
from azu.sharding.durable import replacing, write_all
from azu.sharding.layout import FLOATS, Piece, ShardPlan
from azu.sharding.values import all_finite, cast

_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "bool": "BOOL",
}  # fmt: skip
_DATA_ALIGNMENT = 64


def write_shard(plan: ShardPlan, folder: Path, on_bytes: Callable[[int], None]) -> Shard:
    """Write a shard into `folder`, whole or not at all, and return what structure.json says of it.

    `on_bytes` hears how many bytes of weights were written since its last call. Raises BrokenCheckpoint for a
    value that is not finite.
    """
    start = header(plan)
    digest = hashlib.sha256(start)
    with replacing(folder / f"{plan.name}.safetensors") as file:
        write_all(file, start)
        for chunk in chain.from_iterable(map(_served_values, plan.pieces)):
            digest.update(chunk)
            write_all(file, chunk)
            on_bytes(chunk.nbytes)
    return Shard(
        name=plan.name,
        size_bytes=len(start) + plan.weight_bytes,
        weight_bytes=plan.weight_bytes,
        sha256=digest.hexdigest(),
        active_parameters=plan.active_parameters,
        tensors=plan.tensors,
    )


def header(plan: ShardPlan) -> bytes:
    """Return the safetensors header of a shard, padded so that its data is aligned for mapping."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in plan.pieces:
        end = offset + piece.size_bytes
        entries[piece.source.name] = {
            "dtype": _CODES[piece.dtype], "shape": list(piece.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-(len(content) + 8) % _DATA_ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def _served_values(piece: Piece) -> Iterator[memoryview]:
    for chunk in read_range(piece.source, piece.offset, piece.source_bytes):
        served = chunk
        if piece.source.dtype != piece.dtype:
            served = cast(chunk, piece.source.dtype, piece.dtype)
        if piece.dtype in FLOATS and not all_finite(served, piece.dtype):
            raise BrokenCheckpoint(
                f"{piece.source.file}: {piece.source.name!r} holds values not finite in {piece.dtype}"
            )
        yield served
