"""Cut a checkpoint into shard files, with a journal from which a killed cut is resumed."""

import hashlib
import json
import os
import threading
from collections import Counter
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
from azu.models.checkpoint import DTYPE_CODES, MODEL_FILES, contained_file, read_range
from azu.models.description import Architecture
from azu.models.layout import FLOATS, ShardPlan, TensorRange, plan_shards
from azu.protocol.structure import STRUCTURE_FILE, ModelFile, Shard, Structure

JOURNAL_FILE = ".cut.journal"
_LOCK_FILE = ".cut.lock"
# How long a cut waits for another process that cuts into the same folder.
_LOCK_TIMEOUT_S = 3600.0
# There are more threads than cores, because some of them wait for the disk.
_NUM_THREADS = min(8, 2 * (os.cpu_count() or 1))
_DATA_ALIGNMENT = 64
_SHARD = TypeAdapter(Shard)
# The width of each float dtype, and the bits of its infinity. As integers, the bits of each NaN are larger.
_INFINITY = {
    "float64": (64, 0x7FF << 52),
    "float32": (32, 0xFF << 23),
    "float16": (16, 0x1F << 10),
    "bfloat16": (16, 0xFF << 7),
}


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

    A cut that was killed is resumed; a finished one is verified. `progress` is called with (bytes done, bytes
    in all) of the weights, about once a MiB. Raises BrokenCheckpoint that names the file at fault,
    UnsupportedModel for weights that cannot be cut, Conflict when `out` holds another model.
    """
    plans, tied_head = plan_shards(source, architecture)
    files = {
        name: contained_file(source, name).read_bytes() for name in MODEL_FILES if (source / name).exists()
    }
    busy = f"another process has been cutting {out.name} for an hour"
    with process_lock(out / _LOCK_FILE, timeout_s=_LOCK_TIMEOUT_S, busy=busy):
        for part in out.glob(".*.part"):
            part.unlink()  # a killed cut left it
        known = _known_shards(out, model_id, revision)
        journal = CutJournal(out, _fingerprint(model_id, revision, plans))
        count = _byte_counter(plans, progress)
        complete = partial(
            _complete_shard, out=out, known={**journal.finished, **known}, journal=journal, count=count
        )
        # Reading, checking, hashing and writing release Python's lock: threads keep all cores busy.
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="cut") as pool:
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
            files=tuple(_model_file(name, content) for name, content in files.items()),
            tied_head=tied_head,
            restart_length=architecture.restart_length,
            stored_dtype=_stored_dtype(plans),
        )
        with replacing(out / STRUCTURE_FILE) as file:
            write_all(file, structure.to_json())
        journal.remove()
    return structure


@contextmanager
def process_lock(path: Path, *, timeout_s: float, busy: str) -> Iterator[None]:
    """Hold a lock file, so that no other process does; its folder is made.

    Raises Unavailable with the message `busy` when the lock is not free within `timeout_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=timeout_s):
            yield
    except Timeout as error:
        raise Unavailable(busy) from error


def _known_shards(out: Path, model_id: str, revision: str) -> dict[str, Shard]:
    """Return the shards of a finished cut of the same model."""
    path = out / STRUCTURE_FILE
    if not path.exists():
        return {}
    structure = Structure.from_json(path.read_bytes(), where=str(path))
    if (structure.model_id, structure.revision) != (model_id, revision):
        raise Conflict(f"{out} holds {structure.model_id} at revision {structure.revision}")
    return {shard.name: shard for shard in structure.shards}


def _complete_shard(
    plan: ShardPlan,
    out: Path,
    known: Mapping[str, Shard],
    journal: "CutJournal",
    count: Callable[[int], None],
) -> Shard:
    """Write a shard unless its file is complete and as planned already."""
    shard = known.get(plan.name)
    if shard is not None and plan.describes(shard) and _is_verified(out / shard.file_name, shard, count):
        return shard
    # A structure.json from before is not true again until the last shard is written.
    (out / STRUCTURE_FILE).unlink(missing_ok=True)
    shard = _write_shard(plan, out, count)
    journal.add(shard)
    return shard


def _is_verified(path: Path, shard: Shard, count: Callable[[int], None]) -> bool:
    """Return whether the file at `path` is the shard, byte for byte."""
    if not path.is_file() or path.stat().st_size != shard.size_bytes:
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    count(shard.weight_bytes)
    return digest.hexdigest() == shard.sha256


def _write_shard(plan: ShardPlan, folder: Path, count: Callable[[int], None]) -> Shard:
    """Write a shard into `folder`, completely or not at all, and return its entry in structure.json.

    `count` is called with the number of weight bytes written since its last call. Raises BrokenCheckpoint for
    a value that is not finite.
    """
    start = _header(plan)
    digest = hashlib.sha256(start)
    with replacing(folder / f"{plan.name}.safetensors") as file:
        write_all(file, start)
        for chunk in chain.from_iterable(map(_served_values, plan.ranges)):
            digest.update(chunk)
            write_all(file, chunk)
            count(chunk.nbytes)
    return Shard(
        name=plan.name,
        size_bytes=len(start) + plan.weight_bytes,
        weight_bytes=plan.weight_bytes,
        sha256=digest.hexdigest(),
        active_parameters=plan.active_parameters,
        tensors=plan.tensors,
    )


def _header(plan: ShardPlan) -> bytes:
    """Return the safetensors header of a shard, padded so that its data is aligned for mapping."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in plan.ranges:
        end = offset + one.size_bytes
        entries[one.source.name] = {
            "dtype": DTYPE_CODES[one.dtype], "shape": list(one.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-(len(content) + 8) % _DATA_ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def _served_values(part: TensorRange) -> Iterator[memoryview]:
    for chunk in read_range(part.source, part.offset, part.source_bytes):
        served = chunk
        if part.source.dtype != part.dtype:
            served = cast(chunk, part.source.dtype, part.dtype)
        if part.dtype in FLOATS and not all_finite(served, part.dtype):
            raise BrokenCheckpoint(
                f"{part.source.file}: {part.source.name!r} holds values not finite in {part.dtype}"
            )
        yield served


def all_finite(content: memoryview, dtype: str) -> bool:
    """Return whether values of a float dtype hold neither NaN nor infinity.

    Among signed integers, positive values have the largest bits; among unsigned ones, negative values have.
    So two maxima decide, without a copy and as fast as memory is read.
    """
    width, infinity = _INFINITY[dtype]
    bits = np.frombuffer(content, dtype=f"uint{width}")
    if bits.size == 0:
        return True
    sign = 1 << (width - 1)
    return int(bits.max()) < infinity | sign and int(bits.view(f"int{width}").max()) < infinity


def cast(content: memoryview, source: str, target: str) -> memoryview:
    """Return values of one float dtype in another (torch's names), rounded to nearest."""
    values = torch.frombuffer(content, dtype=getattr(torch, source)).to(getattr(torch, target))
    return values.view(torch.uint8).numpy().data


def _byte_counter(
    plans: Iterable[ShardPlan], progress: Callable[[int, int], None] | None
) -> Callable[[int], None]:
    total = sum(plan.weight_bytes for plan in plans)
    done = 0
    lock = threading.Lock()

    def count(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            if progress is not None:
                progress(done, total)

    return count


def _stored_dtype(plans: Iterable[ShardPlan]) -> str:
    stored: Counter[str] = Counter()
    for one in (one for plan in plans for one in plan.ranges):
        stored[one.source.dtype] += one.source_bytes
    return max(stored, key=lambda dtype: stored[dtype])


def _model_file(name: str, content: bytes) -> ModelFile:
    return ModelFile(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class CutJournal:
    """A file of lines: the fingerprint of the cut, then each shard whose file is finished."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._path = folder / JOURNAL_FILE
        self.finished = _finished_shards(self._path, fingerprint)
        content = [fingerprint.encode(), *(_SHARD.dump_json(shard) for shard in self.finished.values())]
        self._path.write_bytes(b"\n".join(content) + b"\n")

    def add(self, shard: Shard) -> None:
        """Append a finished shard. A line that a crash cut off is ignored when the journal is read."""
        with self._path.open("ab", buffering=0) as file:  # one write per line: threads do not mix their lines
            file.write(_SHARD.dump_json(shard) + b"\n")

    def remove(self) -> None:
        """Delete the journal once structure.json holds the same."""
        self._path.unlink(missing_ok=True)


def _finished_shards(path: Path, fingerprint: str) -> dict[str, Shard]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    if not lines or lines[0] != fingerprint.encode():
        return {}
    shards = {}
    for line in lines[1:-1]:
        try:
            shard = _SHARD.validate_json(line)
        except ValidationError:
            break
        shards[shard.name] = shard
    return shards


def _fingerprint(model_id: str, revision: str, plans: Iterable[ShardPlan]) -> str:
    """Return a hash of what decides the shards' bytes: the source files' sizes and times, and the layout."""
    digest = hashlib.sha256(repr((model_id, revision)).encode())
    seen = {}
    for plan in plans:
        for one in plan.ranges:
            path = one.source.path
            if path not in seen:
                stat = path.stat()
                seen[path] = (stat.st_size, stat.st_mtime_ns)
            place = (plan.name, one.source.name, path.name, seen[path], one.offset, one.source_bytes)
            digest.update(repr((place, one.source.dtype, one.dtype, one.shape)).encode())
    return digest.hexdigest()
