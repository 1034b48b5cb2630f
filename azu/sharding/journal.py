"""What a cut has finished so far, so that a killed one goes on where it was."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from azu.protocol.structure import Shard
from azu.sharding.layout import ShardPlan

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
