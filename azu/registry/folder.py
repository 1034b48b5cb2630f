"""A model in a local folder."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from azu.errors import ModelNotFound
from azu.sharding.checkpoint import INDEX_FILE, MODEL_FILES, contained_file, weight_files

_REVISION_CHARS = 40


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder as its files are now; `revision` is a hash of their content."""

    model_id: str
    revision: str
    weight_bytes: int
    folder: Path

    @classmethod
    def find(cls, model_id: str, folder: Path, revision: str | None) -> "FolderSource":
        """Read the folder's files once, to know their hash.

        Raises ModelNotFound when `revision` is another one, BrokenCheckpoint when weights are missing.
        """
        weights = weight_files(folder, {path.name for path in folder.iterdir()})
        others = [name for name in (*MODEL_FILES, INDEX_FILE) if (folder / name).exists()]
        digest = hashlib.sha256()
        for name in sorted({*weights, *others}):
            digest.update(f"{name}\0{_sha256(_FileState.of(contained_file(folder, name)))}\n".encode())
        found = digest.hexdigest()[:_REVISION_CHARS]
        if revision not in (None, found):
            raise ModelNotFound(
                f"{model_id!r} has changed: it is no longer at revision {revision}", param="model"
            )
        size = sum(contained_file(folder, name).stat().st_size for name in weights)
        return cls(model_id=model_id, revision=found, weight_bytes=size, folder=folder)

    def weights(self, progress: Callable[[int, int], None]) -> Path:
        """Return the folder: everything is there already."""
        progress(self.weight_bytes, self.weight_bytes)
        return self.folder


@dataclass(frozen=True, slots=True)
class _FileState:
    """A file as it is now: equal states are equal contents."""

    path: Path
    size_bytes: int
    changed_at_ns: int

    @classmethod
    def of(cls, path: Path) -> "_FileState":
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_ctime_ns)


@lru_cache(maxsize=4096)
def _sha256(state: _FileState) -> str:
    with state.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
