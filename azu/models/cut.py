"""Cutting a checkpoint into shards."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from azu.errors import BrokenCheckpoint, Conflict, Unavailable
from azu.files import replacing, write_all
from azu.models.checkpoint import MODEL_FILES, contained_file, read_range
from azu.models.description import Architecture
from azu.models.layout import FLOATS, ShardPlan, TensorRange, plan_shards
from azu.protocol.structure import STRUCTURE_FILE, ModelFile, Shard, Structure

JOURNAL_FILE = ".cut.journal"
_SHARD = TypeAdapter(Shard)


class Journal:
    """A file of lines: the fingerprint of what is cut, then every shard that lies under its name."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._path = folder / JOURNAL_FILE
        self.finished = _read(self._path, fingerprint)
        content = [fingerprint.encode(), *(_SHARD.dump_json(shard) for shard in self.finished.values())]
        self._path.write_bytes(b"\n".join(content) + b"\n")

    def add(self, shard: Shard) -> None:
        """Note a finished shard. A line that a crash cut off is ignored when the journal is read."""
        with self._path.open("ab", buffering=0) as file:  # one write: threads do not mix their lines
            file.write(_SHARD.dump_json(shard) + b"\n")

    def remove(self) -> None:
        """Forget the journal: structure.json says the same now."""
        self._path.unlink(missing_ok=True)


def fingerprint(model_id: str, revision: str, plans: Iterable[ShardPlan]) -> str:
    """Return a hash of what decides the shards' bytes: the sources as they are now, and the layout."""
    digest = hashlib.sha256(repr((model_id, revision)).encode())
    seen = {}
    for plan in plans:
        for piece in plan.pieces:
            path = piece.source.path
            if path not in seen:
                stat = path.stat()
                seen[path] = (stat.st_size, stat.st_mtime_ns)
            place = (plan.name, piece.source.name, path.name, seen[path], piece.offset, piece.source_bytes)
            digest.update(repr((place, piece.source.dtype, piece.dtype, piece.shape)).encode())
    return digest.hexdigest()


def _read(path: Path, expected: str) -> dict[str, Shard]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    if not lines or lines[0] != expected.encode():
        return {}
    shards = {}
    for line in lines[1:-1]:
        try:
            shard = _SHARD.validate_json(line)
        except ValidationError:
            break
        shards[shard.name] = shard
    return shards


# The bits of infinity without a sign, in an integer of the dtype's width: every NaN stands above it.
_INFINITY = {
    "float64": (64, 0x7FF << 52),
    "float32": (32, 0xFF << 23),
    "float16": (16, 0x1F << 10),
    "bfloat16": (16, 0xFF << 7),
}


def all_finite(content: memoryview, dtype: str) -> bool:
    """Say whether whole values of a float dtype hold neither NaN nor infinity.

    As signed integers the positive ones have the largest bits, as unsigned ones the negative ones: two
    maxima tell, without a copy and as fast as memory is read.
    """
    width, infinity = _INFINITY[dtype]
    bits = np.frombuffer(content, dtype=f"uint{width}")
    if bits.size == 0:
        return True
    sign = 1 << (width - 1)
    return int(bits.max()) < infinity | sign and int(bits.view(f"int{width}").max()) < infinity


def cast(content: memoryview, source: str, target: str) -> memoryview:
    """Return whole values of one float dtype in another (torch's names), rounded to nearest."""
    values = torch.frombuffer(content, dtype=getattr(torch, source)).to(getattr(torch, target))
    return values.view(torch.uint8).numpy().data


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


def _served_values(piece: TensorRange) -> Iterator[memoryview]:
    for chunk in read_range(piece.source, piece.offset, piece.source_bytes):
        served = chunk
        if piece.source.dtype != piece.dtype:
            served = cast(chunk, piece.source.dtype, piece.dtype)
        if piece.dtype in FLOATS and not all_finite(served, piece.dtype):
            raise BrokenCheckpoint(
                f"{piece.source.file}: {piece.source.name!r} holds values not finite in {piece.dtype}"
            )
        yield served


_LOCK_FILE = ".cut.lock"
# How long a cut waits for another process that cuts into the same folder.
_LOCK_TIMEOUT_S = 3600.0
# More than there are cores: some of them wait for the disk.
_WORKERS = min(8, 2 * (os.cpu_count() or 1))


def cut(
    source: Path,
    out: Path,
    *,
    model_id: str,
    revision: str,
    architecture: Architecture,
    progress: Callable[[int, int], None] | None = None,
) -> Structure:
    """Cut the checkpoint in `source` into shards in `out` and return their structure, as in structure.json.

    A cut that was killed is resumed, a finished one verified. `progress` hears (bytes done, bytes in all) of
    the weights, about once a MiB. Raises BrokenCheckpoint that names the file at fault, UnsupportedModel for
    weights that cannot be cut, Conflict when `out` holds another model.
    """
    plans, tied_head = plan_shards(source, architecture)
    files = {
        name: contained_file(source, name).read_bytes() for name in MODEL_FILES if (source / name).exists()
    }
    with _only_one(out):
        known = _known_shards(out, model_id, revision)
        journal = Journal(out, fingerprint(model_id, revision, plans))
        count = _counter(plans, progress)
        complete = partial(
            _complete, out=out, known={**journal.finished, **known}, journal=journal, count=count
        )
        # Reading, checking, hashing and writing leave Python's lock alone: the shards keep all cores busy.
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="cut") as pool:
            shards = tuple(pool.map(complete, plans))
        for name, content in files.items():
            with replacing(out / name) as file:
                write_all(file, content)
        structure = Structure(
            model_id=model_id,
            revision=revision,
            architecture=architecture.name,
            dtype=architecture.dtype,
            hidden_size=architecture.hidden_size,
            vocab_size=architecture.vocab_size,
            context_length=architecture.context_length,
            layers=architecture.layers,
            shards=shards,
            files=tuple(_describe_file(name, content) for name, content in files.items()),
            tied_head=tied_head,
            restart_length=architecture.restart_length,
        )
        with replacing(out / STRUCTURE_FILE) as file:
            write_all(file, structure.to_json())
        journal.remove()
    return structure


def _verified(path: Path, shard: Shard, on_bytes: Callable[[int], None]) -> bool:
    """Say whether the file at `path` is the shard, byte for byte."""
    if not path.is_file() or path.stat().st_size != shard.size_bytes:
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    on_bytes(shard.weight_bytes)
    return digest.hexdigest() == shard.sha256


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / _LOCK_FILE, timeout=_LOCK_TIMEOUT_S):
            for part in out.glob(".*.part"):
                part.unlink()  # of a cut that was killed
            yield
    except Timeout as error:
        raise Unavailable(f"another process has been cutting {out.name} for an hour") from error


def _known_shards(out: Path, model_id: str, revision: str) -> dict[str, Shard]:
    """Return the shards of a finished cut of the same model."""
    path = out / STRUCTURE_FILE
    if not path.exists():
        return {}
    structure = Structure.from_json(path.read_bytes(), where=str(path))
    if (structure.model_id, structure.revision) != (model_id, revision):
        raise Conflict(f"{out} holds {structure.model_id} at revision {structure.revision}")
    return {shard.name: shard for shard in structure.shards}


def _complete(
    plan: ShardPlan, out: Path, known: Mapping[str, Shard], journal: Journal, count: Callable[[int], None]
) -> Shard:
    """Write a shard unless it is there already, whole and as planned."""
    shard = known.get(plan.name)
    if shard is not None and plan.describes(shard) and _verified(out / shard.file_name, shard, count):
        return shard
    # What structure.json says is not true before the last shard is.
    (out / STRUCTURE_FILE).unlink(missing_ok=True)
    shard = write_shard(plan, out, count)
    journal.add(shard)
    return shard


def _counter(
    plans: Iterable[ShardPlan], progress: Callable[[int, int], None] | None
) -> Callable[[int], None]:
    total = sum(plan.weight_bytes for plan in plans)
    done = 0
    one_at_a_time = threading.Lock()

    def count(num_bytes: int) -> None:
        nonlocal done
        with one_at_a_time:
            done += num_bytes
            if progress is not None:
                progress(done, total)

    return count


def _describe_file(name: str, content: bytes) -> ModelFile:
    return ModelFile(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
