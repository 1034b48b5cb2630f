"""Cutting a checkpoint into shards."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from azu.architecture.description import Architecture
from azu.errors import Conflict, Unavailable
from azu.protocol.structure import STRUCTURE_FILE, ModelFile, Shard, Structure
from azu.sharding.checkpoint import MODEL_FILES, contained_file
from azu.sharding.durable import replacing, write_all
from azu.sharding.journal import Journal, fingerprint
from azu.sharding.layout import ShardPlan
from azu.sharding.plan import plan_shards
from azu.sharding.writer import write_shard

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
