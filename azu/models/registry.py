"""The registry of models by id: each is described before a user pays for it, and cut once per network."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from azu.errors import AzuError, Forbidden, InvalidRequest, ModelNotFound, NotFound, Unavailable
from azu.files import disk_errors
from azu.models import inspection
from azu.models.checkpoint import MODEL_FILES, contained_file
from azu.models.cut import cut, process_lock
from azu.models.description import AvailableModel, ModelDescription
from azu.models.hub import MAX_DESCRIPTION_BYTES, cached_bytes, forget
from azu.models.room import Model, ModelRoom
from azu.models.sources import (
    Source,
    built_in_models,
    find_source,
    is_built_in,
    is_offered,
    model_folder_name,
    newest_of,
)
from azu.models.status import ModelState, RedisModelStatus, StatusReporter
from azu.protocol.structure import STRUCTURE_FILE, Shard, Structure
from azu.units import GIB

# How long the registry takes a name such as "main" to mean the same commit.
_PINNED_S = 300.0
_MAX_DESCRIBED = 64
# Their config and tokenizer files together; one model may have a quarter of it.
_MAX_DESCRIBED_BYTES = GIB
# How long a caller waits while another process cuts the same model.
_CUT_TIMEOUT_S = 6 * 3600.0
_REVISION = re.compile(r"[0-9a-f]{40,64}")


class ModelRegistry:
    """Models of one network, with their shards under `root`; methods block and are thread-safe.

    Model folders are accepted only under `model_roots`. A model with more than `max_model_bytes` of weights,
    or whose id matches no pattern in `offered`, is refused before its weights are fetched. The models that
    were not used for longest are removed while less than `free_bytes` would be free on the disk, but none
    that is `deployed`.
    """

    def __init__(
        self,
        root: Path,
        *,
        model_roots: Sequence[Path],
        status: RedisModelStatus,
        max_model_bytes: int,
        offered: Sequence[str] = ("*",),
        free_bytes: int = 0,
        deployed: Callable[[], Set[Model]] = frozenset,
    ) -> None:
        self._root = root
        self._home = root.parent
        self._model_roots = tuple(model_roots)
        self._offered = tuple(offered)
        self._status = status
        self._max_model_bytes = max_model_bytes
        # One thread at a time describes a model. Callers choose the ids, so the number of locks is fixed.
        self._describing = tuple(threading.Lock() for _ in range(_MAX_DESCRIBED))
        self._pins: dict[tuple[str, str | None], tuple[str, float]] = {}
        self._described: dict[tuple[str, str], ModelDescription] = {}
        self._structures: dict[tuple[str, str], Structure] = {}
        self._room = ModelRoom(root, free_bytes)
        # One model at a time takes room, or two would take the same.
        self._making_room = threading.Lock()
        self._deployed = deployed
        # The models that are fetched and cut now, and the bytes that each may write until its end.
        self._promised: list[tuple[Model, int]] = []
        root.mkdir(parents=True, exist_ok=True)

    def new_bytes(self, model_id: str) -> int:
        """Return how many bytes a model has whose newest revision the network never had; 0 for others.

        A listing alone says so. Raises what `describe` does.
        """
        self._check_offered(model_id)
        is_new, pinned = self._is_new(model_id), self._recent_commit(model_id, None)
        if not is_new and (model_id.startswith("/") or (pinned and not self._is_new(model_id, pinned))):
            return 0
        try:
            with disk_errors(self._home), self._near_named(model_id):
                commit, num_bytes = newest_of(model_id, self._model_roots)
        except (ModelNotFound, Unavailable):
            if is_new:
                raise
            return 0  # what the network has is served without the Hub
        return max(1, num_bytes) if self._is_new(model_id, commit) else 0

    def _is_new(self, model_id: str, revision: str = "") -> bool:
        """Whether the network never had a model, or one revision of a repository."""
        if is_built_in(model_id):
            return False
        known = self._status.get(model_id)
        if known.state is ModelState.UNKNOWN:
            return True
        # A folder is its owner's, who changes it as he likes.
        is_known = revision in ("", known.revision) or model_id.startswith("/")
        return not is_known and self.structure(model_id, revision) is None

    def describe(
        self, model_id: str, revision: str | None = None, is_asked_for: bool = True
    ) -> ModelDescription:
        """Return a model at one revision, by default the newest; only config and tokenizer are fetched.

        What is new and not `is_asked_for`, but is described for a job of long ago, stays new.
        Raises InvalidRequest for a malformed id or a model that is too large, Forbidden for a model that is
        not offered, ModelNotFound, UnsupportedModel, BrokenCheckpoint, and Unavailable when the Hub does not
        answer.
        """
        self._check_offered(model_id)
        # A model that is known does not wait for the lookup of another one with the same lock.
        if (known := self._known(model_id, revision)) is not None:
            return known
        with disk_errors(self._home), self._describing[hash(model_id) % len(self._describing)]:
            if (known := self._known(model_id, revision)) is not None:
                return known
            if model_id.startswith("/") or not self._is_fetched(model_id, revision):
                return self._found(model_id, revision, is_asked_for)
            with self._room_for((model_id, revision or ""), MAX_DESCRIPTION_BYTES):
                try:
                    return self._found(model_id, revision, is_asked_for)
                finally:
                    if is_asked_for:
                        self._forget_unused(model_id)

    def _found(self, model_id: str, revision: str | None, is_asked_for: bool) -> ModelDescription:
        with self._near_named(model_id):
            source = self._find(model_id, revision)
        self._pins[model_id, revision] = (source.revision, time.monotonic())
        known = self._described.get((model_id, source.revision))
        if not is_asked_for and self._is_new(model_id, source.revision):
            return _describe(source)
        return self._remember(source) if known is None else known

    def _is_fetched(self, model_id: str, revision: str | None) -> bool:
        """Whether a description fetches files of a repository that the network never had."""
        if self._is_new(model_id) or (revision and not _REVISION.fullmatch(revision)):
            return True
        try:
            commit = revision or newest_of(model_id, self._model_roots)[0]
        except (ModelNotFound, Unavailable):
            return False  # what the network has is served without the Hub
        return self._is_new(model_id, commit)

    def _forget_unused(self, model_id: str) -> None:
        """Have a repository's revisions leave the cache but the current one and those that are cut or in use.

        One that cannot be described would else lie there for ever, and so would each that was followed.
        """
        in_use = (*self._deployed(), *(model for model, _ in self._promised))
        # The folder of a revision is there once it is cut, its lock from the beginning of the cut.
        cut_here = {path.stem for path in (self._root / model_folder_name(model_id)).glob("*")}
        used = {revision for name, revision in in_use if name == model_id}
        forget(model_id, kept={self._status.get(model_id).revision} | cut_here | used)

    def _known(self, model_id: str, revision: str | None) -> ModelDescription | None:
        """Return a model that was described shortly before, and note that it was used."""
        commit = self._recent_commit(model_id, revision)
        known = None if commit is None else self._described.get((model_id, commit))
        if known is not None:
            with disk_errors(self._home):
                self._room.note_used(model_id)
        return known

    def _check_offered(self, model_id: str) -> None:
        if not is_offered(model_id, self._offered):
            raise Forbidden(
                f"{model_id[:80]!r} is not among the models that this network offers{self._near(model_id)}",
                param="model",
                code="model_not_offered",
            )

    @contextmanager
    def _near_named(self, model_id: str) -> Iterator[None]:
        """Have the error for a model that is not found name those with a similar id."""
        try:
            yield
        except (ModelNotFound, Unavailable) as error:
            told = f"{error.message}{self._near(model_id)}"
            raise type(error)(told, param=error.param, code=error.code) from error

    def ensure_cut(self, model_id: str, revision: str) -> Structure:
        """Return the model's structure when all its shards are on disk; the first caller fetches and cuts.

        Raises what `describe` and `cut` raise; the error is written into the model's status too.
        """
        ready = self.structure(model_id, revision)
        if ready is not None:
            return ready
        folder = self._folder(model_id, revision)
        busy = "another process has been cutting this model for hours"
        lock = folder.with_name(f"{folder.name}.lock")
        with disk_errors(self._home), process_lock(lock, timeout_s=_CUT_TIMEOUT_S, busy=busy):
            ready = self.structure(model_id, revision)
            if ready is not None:
                return ready
            report = StatusReporter(self._status, model_id, revision)
            try:
                with disk_errors(self._home):
                    structure = self._cut(self._find(model_id, revision), folder, report)
            except Exception as error:
                report.failed(error.message if isinstance(error, AzuError) else repr(error))
                raise
            report.ready(sum(shard.weight_bytes for shard in structure.shards))
            return structure

    def _cut(self, source: Source, folder: Path, report: StatusReporter) -> Structure:
        # A folder's weights are there already; those of a repository are fetched and then cut.
        copies = 1 if source.model_id.startswith("/") or is_built_in(source.model_id) else 2
        self._room.note_used(source.model_id)
        with self._room_for((source.model_id, source.revision), copies * source.weight_bytes):
            return cut(
                source.weights(report.fetching),
                folder,
                model_id=source.model_id,
                revision=source.revision,
                architecture=inspection.describe(source.folder),
                progress=report.cutting,
            )

    def structure(self, model_id: str, revision: str) -> Structure | None:
        """Return the structure of a cut model, or None when it is not cut or a shard is missing."""
        folder = self._folder(model_id, revision)
        path = folder / STRUCTURE_FILE
        if not path.exists():
            return None
        if (model_id, revision) not in self._structures:
            with disk_errors(self._home):
                content = path.read_bytes()
            structure = Structure.from_json(content, where=str(path.relative_to(self._home)))
            if not all(_has_size(folder / shard.file_name, shard) for shard in structure.shards):
                return None
            self._structures[model_id, revision] = structure
        return self._structures[model_id, revision]

    def available(self) -> list[AvailableModel]:
        """Return the models that are built in or cut, sorted by id."""
        offered = [model_id for model_id in built_in_models() if is_offered(model_id, self._offered)]
        built_in = {model_id: self.describe(model_id) for model_id in offered}
        found = {
            model_id: AvailableModel(
                model_id, one.revision, len(one.architecture.layers), one.architecture.context_length
            )
            for model_id, one in built_in.items()
        }
        for status in self._status.ready():
            if status.model_id in found or not is_offered(status.model_id, self._offered):
                continue
            cut_model = self.structure(status.model_id, status.revision)
            if cut_model is not None:
                found[status.model_id] = AvailableModel(
                    status.model_id, status.revision, cut_model.num_layers, cut_model.context_length
                )
        return sorted(found.values(), key=lambda model: model.model_id)

    def shard_path(self, model_id: str, revision: str, shard_name: str) -> Path:
        """Return the path of a shard's file; raises NotFound."""
        structure = self.structure(model_id, revision)
        names = {shard.name: shard.file_name for shard in structure.shards} if structure else {}
        return self._cut_file(model_id, revision, names.get(shard_name))

    def read_shard(self, model_id: str, revision: str, shard_name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard from `offset` on, fewer only at its end; raises NotFound."""
        path = self.shard_path(model_id, revision, shard_name)
        with disk_errors(self._home), path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def read_file(self, model_id: str, revision: str, name: str) -> bytes:
        """Return the content of a cut model's config or tokenizer file; raises NotFound."""
        structure = self.structure(model_id, revision)
        names = {file.name for file in structure.files} if structure else set()
        with disk_errors(self._home):
            return self._cut_file(model_id, revision, name if name in names else None).read_bytes()

    def _cut_file(self, model_id: str, revision: str, name: str | None) -> Path:
        path = self._folder(model_id, revision) / name if name else None
        if path is None or not path.is_file():
            raise NotFound(f"{model_id} at {revision} has no such file here")
        return path

    def _find(self, model_id: str, revision: str | None) -> Source:
        return find_source(model_id, revision, self._model_roots, self._max_model_bytes)

    def _near(self, model_id: str) -> str:
        """Return the end of an error: which models have nearly this id, and how to see all."""
        known = {*built_in_models(), *(status.model_id for status in self._status.ready())}
        near = get_close_matches(model_id, [one for one in known if is_offered(one, self._offered)])
        nearest = f"; nearest: {', '.join(near)}" if near else ""
        return f"{nearest}. `azu models` shows all that are here"

    def _recent_commit(self, model_id: str, revision: str | None) -> str | None:
        if revision is not None and (model_id, revision) in self._described:
            return revision
        commit, pinned_at_s = self._pins.get((model_id, revision), (None, 0.0))
        # A folder may change at any time, and reading its state again is cheap.
        expired = model_id.startswith("/") or time.monotonic() - pinned_at_s > _PINNED_S
        return None if expired else commit

    def _remember(self, source: Source) -> ModelDescription:
        key = (source.model_id, source.revision)
        description = _describe(source)
        if self.structure(*key) is None:
            StatusReporter(self._status, *key).described(source.weight_bytes)
        self._described[key] = description
        kept = [sum(map(len, one.files.values())) for one in list(self._described.values())]
        for oldest in list(self._described)[:-1]:
            if len(kept) <= _MAX_DESCRIBED and sum(kept) <= _MAX_DESCRIBED_BYTES:
                break
            self._described.pop(oldest, None)
            kept.pop(0)
        self._room.note_used(source.model_id)
        return description

    @contextmanager
    def _room_for(self, model: Model, num_bytes: int) -> Iterator[None]:
        """Have room for a model, which no other one takes until the block ends."""
        promise = (model, num_bytes)
        with self._making_room:
            in_use = {model, *self._deployed(), *(one for one, _ in self._promised)}
            total = num_bytes + sum(promised for _, promised in self._promised)
            self._room.make(total, model, in_use, self._leave, self._cached_bytes)
            self._promised.append(promise)
        try:
            yield
        finally:
            self._promised.remove(promise)

    def _leave(self, model_id: str, revision: str) -> None:
        """Forget a model that leaves the disk, or one revision of it; a model then costs a fee again."""
        if not revision:
            self._status.remove(model_id)
        for known in (self._structures, self._described):
            for key in [one for one in known if one[0] == model_id and revision in ("", one[1])]:
                known.pop(key, None)
        if not model_id.startswith("/"):
            forget(model_id, revision)

    def _cached_bytes(self, model_id: str, revision: str) -> int:
        return 0 if model_id.startswith("/") else cached_bytes(model_id, revision, self._root)

    def _folder(self, model_id: str, revision: str) -> Path:
        if not _REVISION.fullmatch(revision):
            raise InvalidRequest(f"{revision!r} is no commit", param="revision")
        return self._root / model_folder_name(model_id) / revision


def _describe(source: Source) -> ModelDescription:
    names = [name for name in MODEL_FILES if (source.folder / name).exists()]
    return ModelDescription(
        model_id=source.model_id,
        revision=source.revision,
        architecture=inspection.describe(source.folder),
        files={name: contained_file(source.folder, name).read_bytes() for name in names},
    )


def _has_size(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.size_bytes
