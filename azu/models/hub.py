"""Models on the Hugging Face Hub. Its library reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE."""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import (
    DeleteCacheStrategy,
    HfApi,
    constants,
    get_session,
    is_offline_mode,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not re-exported
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from azu.errors import BrokenCheckpoint, InvalidRequest, ModelNotFound, Unavailable
from azu.models.checkpoint import CONFIG_FILE, INDEX_FILE, MODEL_FILES, SINGLE_FILE, weight_files

log = logging.getLogger(__name__)

# Without a timeout the library waits for ever.
_REPLY_TIMEOUT_S = 20.0
# Config, tokenizer and index are fetched before a user has paid. No honest model has larger ones.
MAX_DESCRIPTION_BYTES = 256 * 1024 * 1024
_DESCRIPTION_FILES = (*MODEL_FILES, INDEX_FILE)
_SHA256_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository at one commit; `folder` is its snapshot in the cache, at first without weights."""

    model_id: str
    revision: str
    folder: Path
    weight_names: tuple[str, ...]
    weight_bytes: int
    listing: "Listing"

    def weights(self, progress: Callable[[int, int], None]) -> Path:
        """Download only the weight files that are not in the cache yet; raises as `find_on_hub` does."""
        with _hub_errors(self.model_id):
            folder = _fetched(
                self.model_id,
                self.revision,
                self.weight_names,
                self.listing,
                lambda done: progress(min(done, self.weight_bytes), self.weight_bytes),
            )
        progress(self.weight_bytes, self.weight_bytes)
        return folder


def find_on_hub(model_id: str, revision: str | None) -> HubSource:
    """Pin a repository to a commit and fetch its config, tokenizer and index.

    Raises InvalidRequest for an id that no repository can have, before any request is sent; ModelNotFound;
    BrokenCheckpoint when the repository has no safetensors weights, or when a file came twice with another
    content than the Hub's own hash names; Unavailable when the Hub does not answer and the model is not in
    the cache.
    """
    _check_id(model_id)
    with _hub_errors(model_id):
        commit = HfApi().resolve_revision(model_id, revision=revision).resolved
        listing = _listing(model_id, commit)
        if listing is not None:
            _check_description_files(model_id, listing)
        folder = _fetched(model_id, commit, _DESCRIPTION_FILES, listing or {})
    sizes = {name: file.size for name, file in (listing or {}).items()}
    present = sizes or {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    names = weight_files(folder, present)
    missing = [name for name in names if name not in present]
    if missing and listing is None:
        raise Unavailable(f"the Hub cannot be reached, and {model_id} is not whole in the cache")
    if missing:
        raise BrokenCheckpoint(f"{model_id} has no {missing[0]}, which its {INDEX_FILE} names")
    return HubSource(model_id, commit, folder, names, sum(present[name] for name in names), listing or {})


def newest_on_hub(model_id: str) -> tuple[str, int]:
    """Return a repository's newest commit and the bytes that azu would fetch of it, by its listing alone.

    Raises as `find_on_hub`.
    """
    _check_id(model_id)
    with _hub_errors(model_id):
        commit = HfApi().resolve_revision(model_id, revision=None).resolved
        listing = _listing(model_id, commit)
    if listing is None:
        raise Unavailable(f"the Hub does not say how large {model_id} is")
    weights = {SINGLE_FILE} & listing.keys() or {name for name in listing if name.endswith(".safetensors")}
    wanted = (file.size for name, file in listing.items() if name in weights or name in _DESCRIPTION_FILES)
    return commit, sum(wanted)


def forget(model_id: str, revision: str = "", kept: Collection[str] = ()) -> None:
    """Remove a repository, or one revision of it, from the cache, but no revision that is `kept`."""
    with suppress(CacheNotFound):
        _deletion(model_id, revision, kept).execute()


def cached_bytes(model_id: str, revision: str, folder: Path) -> int:
    """Return what `forget` frees on the disk of a folder."""
    with suppress(CacheNotFound):
        deletion = _deletion(model_id, revision)
        if Path(constants.HF_HUB_CACHE).stat().st_dev == folder.stat().st_dev:
            return deletion.expected_freed_size
    return 0


def _deletion(model_id: str, revision: str, kept: Collection[str] = ()) -> DeleteCacheStrategy:
    repository = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model_id, repo_type="model"))
    # To resolve a name writes it down, and the library finds no repository with a name of what is not there.
    for name in (repository / "refs").rglob("*"):
        if name.is_file() and not (repository / "snapshots" / name.read_text()).exists():
            name.unlink(missing_ok=True)
    cache = scan_cache_dir(constants.HF_HUB_CACHE)
    # A copy of a repository has the same commits.
    mine = replace(cache, repos=frozenset(one for one in cache.repos if one.repo_path == repository))
    found = {one.commit_hash for repo in mine.repos for one in repo.revisions}
    return mine.delete_revisions(*(one for one in found if revision in ("", one) and one not in kept))


def _check_id(model_id: str) -> None:
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise InvalidRequest(f"{model_id!r} is no model id", param="model") from error
    get_session().timeout = _REPLY_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class _ListedFile:
    """A file as the Hub lists it; `digest` is the sha256 of a large file, git's hash of another one."""

    size: int
    digest: str

    def is_at(self, path: Path) -> bool:
        """Return whether a file has the listed content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            if not self.digest:
                return True
            if len(self.digest) == _SHA256_CHARACTERS:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.digest
            # Git hashes a file's length and content.
            found = hashlib.sha1(f"blob {self.size}\0".encode() + file.read(), usedforsecurity=False)
            return found.hexdigest() == self.digest


Listing = Mapping[str, _ListedFile]


def _check_description_files(model_id: str, listing: Listing) -> None:
    """Refuse a repository that cannot be described, before any file is downloaded."""
    if CONFIG_FILE not in listing:
        raise BrokenCheckpoint(f"{model_id} has no {CONFIG_FILE}")
    if sum(listing[name].size for name in _DESCRIPTION_FILES if name in listing) > MAX_DESCRIPTION_BYTES:
        raise BrokenCheckpoint(f"{model_id}: config and tokenizer exceed {MAX_DESCRIPTION_BYTES} bytes")
    if INDEX_FILE not in listing:
        weight_files(Path(), listing)


def _listing(model_id: str, commit: str) -> Listing | None:
    """Return the repository's files by name, or None when the Hub cannot be reached."""
    try:
        info = HfApi().model_info(model_id, revision=commit, files_metadata=True, timeout=_REPLY_TIMEOUT_S)
        return {
            file.rfilename: _ListedFile(file.size, file.lfs.sha256 if file.lfs else file.blob_id or "")
            for file in info.siblings or ()
            if file.size is not None
        }
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return None
    except (HTTPError, OfflineModeIsEnabled):
        return None


def _fetched(
    model_id: str,
    commit: str,
    names: Sequence[str],
    listing: Listing,
    report: Callable[[int], None] | None = None,
) -> Path:
    """Return the folder with these files; one that is not as listed is downloaded once more.

    Files without an entry in the listing are not checked: it is empty while the Hub cannot be reached.
    """
    wrong, fault = tuple(names), ""
    for is_second in (False, True):
        try:
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=commit,
                    allow_patterns=list(wrong),
                    tqdm_class=_reporting(report),
                    force_download=is_second,
                )
            )
        except OSError as error:
            if type(error) is not OSError or error.errno is not None:
                raise
            fault = str(error).partition("\n")[0]  # the library's own check of a file's size
            continue
        if not (wrong := _not_as_listed(folder, wrong, listing)):
            return folder
        fault = f"{wrong[0]} has not the content that the Hub lists"
        log.warning("%s: %s", model_id, fault)
    raise BrokenCheckpoint(f"{model_id} was downloaded twice: {fault}")


def _not_as_listed(folder: Path, names: Iterable[str], listing: Listing) -> tuple[str, ...]:
    listed = [name for name in names if name in listing]
    with ThreadPoolExecutor() as pool:
        good = pool.map(lambda name: listing[name].is_at(folder / name), listed)
        return tuple(name for name, is_good in zip(listed, good, strict=True) if not is_good)


@contextmanager
def _hub_errors(model_id: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFound(f"{model_id} is gated: HF_TOKEN has no access to it", param="model") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelNotFound(f"the Hub has no such model or revision: {model_id}", param="model") from error
    except (RevisionResolutionError, LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        if is_offline_mode():
            raise ModelNotFound(
                f"{model_id} is not in the cache, and HF_HUB_OFFLINE is set", param="model"
            ) from error
        raise Unavailable(f"the Hub cannot be reached, and {model_id} is not in the cache") from error


def _reporting(report: Callable[[int], None] | None) -> type[hub_tqdm]:
    """Return a progress bar class that draws nothing and reports the bytes of all files together."""
    done = 0

    class Reporting(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            if report is not None and self._counts_bytes:
                done += int(n or 0)
                report(done)
            return None

    return Reporting
