"""A model in a local folder."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from azu.errors import BrokenCheckpoint, InvalidRequest, ModelNotFound
from azu.sharding.checkpoint import INDEX_FILE, MODEL_FILES, contained_file, weight_files
from azu.units import format_bytes

_REVISION_CHARS = 40


def refuse_large(model_id: str, weight_bytes: int, max_weight_bytes: int | None) -> None:
    """Raise InvalidRequest (`model_too_large`) for more weights than a network takes."""
    if max_weight_bytes is not None and weight_bytes > max_weight_bytes:
        raise InvalidRequest(
            f"{model_id} has {format_bytes(weight_bytes)} of weights; "
            f"this network takes up to {format_bytes(max_weight_bytes)}",
            param="model",
            code="model_too_large",
        )


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder as its files are now; `revision` is a hash of their content."""

    model_id: str
    revision: str
    weight_bytes: int
    folder: Path

    @classmethod
    def find(
        cls, model_id: str, folder: Path, revision: str | None, max_weight_bytes: int | None = None
    ) -> "FolderSource":
        """Read the folder's files once, to know their hash.

        Raises ModelNotFound when `revision` is another one, BrokenCheckpoint when weights are missing or a
        file cannot be read, InvalidRequest for more weights than `max_weight_bytes`, unread.
        """
        try:
            return cls._read(model_id, folder, revision, max_weight_bytes)
        except OSError as error:
            name = Path(error.filename).name if isinstance(error.filename, str) else folder.name
            raise BrokenCheckpoint(f"{name} cannot be read: {error.strerror}") from error

    @classmethod
    def _read(
        cls, model_id: str, folder: Path, revision: str | None, max_weight_bytes: int | None
    ) -> "FolderSource":
        weights = weight_files(folder, {path.name for path in folder.iterdir()})
        size = sum(contained_file(folder, name).stat().st_size for name in weights)
        refuse_large(model_id, size, max_weight_bytes)
        others = [name for name in (*MODEL_FILES, INDEX_FILE) if (folder / name).exists()]
        digest = hashlib.sha256()
        for name in sorted({*weights, *others}):
            digest.update(f"{name}\0{_sha256(_FileState.of(contained_file(folder, name)))}\n".encode())
        found = digest.hexdigest()[:_REVISION_CHARS]
        if revision not in (None, found):
            raise ModelNotFound(
                f"{model_id!r} has changed: it is no longer at revision {revision}", param="model"
            )
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
