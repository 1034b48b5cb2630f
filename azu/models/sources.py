"""Find the model of an id: a built-in model, a folder under an allowed root, or a repository on the Hub."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

from azu.errors import BrokenCheckpoint, InvalidRequest, ModelNotFound
from azu.files import CONFIGS
from azu.models.checkpoint import INDEX_FILE, MODEL_FILES, contained_file, weight_files
from azu.models.hub import find_on_hub, newest_on_hub
from azu.units import format_bytes

_REVISION_CHARS = 40
_BUILT_IN = re.compile(r"azu/([a-z0-9]+(?:-[a-z0-9]+)*)")
# Git and the Hub allow more; this excludes all that could lead out of a folder.
_REVISION = re.compile(r"[A-Za-z0-9_]+(?:[./-][A-Za-z0-9_]+)*")
_BUILT_IN_FOLDER = CONFIGS / "models"
_MAX_ID_CHARS = 512
_MAX_READABLE_CHARS = 64


class Source(Protocol):
    """A model at one fixed revision."""

    @property
    def model_id(self) -> str:
        """The id that it was requested by."""

    @property
    def revision(self) -> str:
        """A commit or a hash of the content."""

    @property
    def weight_bytes(self) -> int:
        """Size of its weight files."""

    @property
    def folder(self) -> Path:
        """The folder with its config and tokenizer files."""

    def weights(self, progress: Callable[[int, int], None]) -> Path:
        """Return a folder that has the weights too; calls `progress` with (bytes done, bytes in all)."""


def find_source(
    model_id: str, revision: str | None, roots: Sequence[Path], max_weight_bytes: int | None = None
) -> Source:
    """Return the model of an id: an absolute path is a folder, "azu/..." is built in, others are on the Hub.

    Raises InvalidRequest for a malformed id or revision, before disk and network are used, and for a model
    with more than `max_weight_bytes` of weights, before they are read; ModelNotFound when there is no such
    model or revision.
    """
    if not 0 < len(model_id) <= _MAX_ID_CHARS or not model_id.isprintable():
        raise InvalidRequest("the model's id is empty, too long or not printable", param="model")
    if revision is not None and (len(revision) > _MAX_ID_CHARS or not _REVISION.fullmatch(revision)):
        raise InvalidRequest(f"{revision!r} is no revision", param="revision")
    if model_id.startswith("/"):
        folder = _allowed_folder(model_id, roots)
        return FolderSource.find(model_id, folder, revision, max_weight_bytes)
    if is_built_in(model_id):
        return FolderSource.find(model_id, _built_in(model_id), revision, max_weight_bytes)
    source = find_on_hub(model_id, revision)
    _refuse_large(model_id, source.weight_bytes, max_weight_bytes)
    return source


def newest_of(model_id: str, roots: Sequence[Path]) -> tuple[str, int]:
    """Return a repository's newest commit, "" for a folder, and the bytes of its files, without reading them.

    Raises as `find_source`.
    """
    if not model_id.startswith("/"):
        return newest_on_hub(model_id)
    folder = _allowed_folder(model_id, roots)
    return "", sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _built_in(model_id: str) -> Path:
    match = _BUILT_IN.fullmatch(model_id)
    folder = _BUILT_IN_FOLDER / match[1] if match else None
    if folder is None or not folder.is_dir():
        raise ModelNotFound(f"there is no built-in model {model_id!r}", param="model")
    return folder


def _allowed_folder(model_id: str, roots: Sequence[Path]) -> Path:
    asked = PurePosixPath(model_id)
    if ".." in asked.parts or not any(asked.is_relative_to(root) for root in roots):
        raise InvalidRequest(f"{model_id!r} is not under a folder that models may come from", param="model")
    try:
        folder = Path(asked).resolve()
    except (OSError, RuntimeError) as error:  # a link to itself, or a name that is too long
        raise InvalidRequest(f"{model_id!r} leads nowhere", param="model") from error
    if not any(folder.is_relative_to(root.resolve()) for root in roots):
        raise InvalidRequest(f"{model_id!r} leads out of the folder that models may come from", param="model")
    if not folder.is_dir():
        raise ModelNotFound(f"there is no model folder {model_id!r}", param="model")
    return folder


def _refuse_large(model_id: str, weight_bytes: int, max_weight_bytes: int | None) -> None:
    """Raise InvalidRequest (`model_too_large`) for more weights than a network accepts."""
    if max_weight_bytes is not None and weight_bytes > max_weight_bytes:
        raise InvalidRequest(
            f"{model_id} has {format_bytes(weight_bytes)} of weights; "
            f"this network takes up to {format_bytes(max_weight_bytes)}",
            param="model",
            code="model_too_large",
        )


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder with its files as they are now; `revision` is a hash of their content."""

    model_id: str
    revision: str
    weight_bytes: int
    folder: Path

    @classmethod
    def find(
        cls, model_id: str, folder: Path, revision: str | None, max_weight_bytes: int | None = None
    ) -> "FolderSource":
        """Read the folder's files once, for their hash.

        Raises ModelNotFound when the content is not that of `revision`, BrokenCheckpoint when weights are
        missing or a file cannot be read, InvalidRequest for more than `max_weight_bytes` of weights.
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
        _refuse_large(model_id, size, max_weight_bytes)
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
        """Return the folder: it has the weights already."""
        progress(self.weight_bytes, self.weight_bytes)
        return self.folder


@dataclass(frozen=True, slots=True)
class _FileState:
    """A file as it is now: equal states mean equal content."""

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


def is_offered(model_id: str, patterns: Sequence[str]) -> bool:
    """Return whether an id equals one of the patterns or matches one such as "azu/*"; case matters."""
    return any(fnmatchcase(model_id, pattern) for pattern in patterns)


def is_built_in(model_id: str) -> bool:
    """Return whether an id is one of a model that comes with azu."""
    return model_id.startswith("azu/")


def built_in_models() -> list[str]:
    """Return the ids of the models that come with azu."""
    return sorted(f"azu/{config.parent.name}" for config in _BUILT_IN_FOLDER.glob("*/config.json"))


def model_folder_name(model_id: str) -> str:
    """Return the name of the folder for a model's revisions: readable, and different for each id."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", model_id).strip("-.")[-_MAX_READABLE_CHARS:]
    return f"{readable}-{hashlib.sha256(model_id.encode()).hexdigest()[:16]}"
