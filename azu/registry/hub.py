"""A model on the Hugging Face Hub; its library heeds HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import HfApi, RepoFile, get_session, resolve_revision, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not re-exported
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from azu.errors import BrokenCheckpoint, InvalidRequest, ModelNotFound, Unavailable
from azu.sharding.checkpoint import CONFIG_FILE, INDEX_FILE, MODEL_FILES, weight_files

# The library waits for ever otherwise.
_REPLY_TIMEOUT_S = 20.0
# Config, tokenizer and index come before anybody has paid: no honest ones are larger.
_MAX_DESCRIPTION_BYTES = 256 * 1024 * 1024
_DESCRIPTION_FILES = (*MODEL_FILES, INDEX_FILE)


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository at one commit; `folder` is its snapshot in the library's cache, so far without weights."""

    model_id: str
    revision: str
    folder: Path
    weight_names: tuple[str, ...]
    weight_bytes: int

    def weights(self, progress: Callable[[int, int], None]) -> Path:
        """Download the weight files that are not in the cache yet, nothing else."""
        with _hub_errors(self.model_id):
            folder = snapshot_download(
                self.model_id,
                revision=self.revision,
                allow_patterns=list(self.weight_names),
                tqdm_class=_reporting(lambda done: progress(min(done, self.weight_bytes), self.weight_bytes)),
            )
        progress(self.weight_bytes, self.weight_bytes)
        return Path(folder)


def find_on_hub(model_id: str, revision: str | None) -> HubSource:
    """Pin a repository to a commit and fetch its config, tokenizer and index.

    Raises InvalidRequest for an id that no repository can have, before anything is asked; ModelNotFound;
    BrokenCheckpoint when it has no safetensors weights; Unavailable when the Hub does not answer and the
    cache does not know.
    """
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise InvalidRequest(f"{model_id!r} is no model id", param="model") from error
    get_session().timeout = _REPLY_TIMEOUT_S
    with _hub_errors(model_id):
        commit = resolve_revision(model_id, revision=revision).resolved
        listing = _listing(model_id, commit)
        if listing is not None and CONFIG_FILE not in listing:
            raise BrokenCheckpoint(f"{model_id} has no {CONFIG_FILE}")
        if (
            listing is not None
            and sum(listing.get(name, 0) for name in _DESCRIPTION_FILES) > _MAX_DESCRIPTION_BYTES
        ):
            raise BrokenCheckpoint(
                f"{model_id}: config and tokenizer are larger than {_MAX_DESCRIPTION_BYTES} bytes"
            )
        folder = Path(snapshot_download(model_id, revision=commit, allow_patterns=list(_DESCRIPTION_FILES)))
    if listing is None:
        listing = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    names = weight_files(folder, listing)
    for name in names:
        if name not in listing:
            raise BrokenCheckpoint(f"{model_id} has no {name}, which its index names")
    size = sum(listing[name] for name in names)
    return HubSource(model_id, commit, folder, names, size)


def _listing(model_id: str, commit: str) -> Mapping[str, int] | None:
    """Return the sizes of the repository's files by name, or None when the Hub cannot be reached."""
    try:
        entries = HfApi().list_repo_tree(model_id, revision=commit)
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return None
    except (HTTPError, OfflineModeIsEnabled):
        return None


@contextmanager
def _hub_errors(model_id: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFound(f"{model_id} is gated: HF_TOKEN has no access to it", param="model") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelNotFound(f"the Hub has no such model or revision: {model_id}", param="model") from error
    except (RevisionResolutionError, LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        raise Unavailable(f"the Hub cannot be reached, and {model_id} is not in the cache") from error


def _reporting(report: Callable[[int], None]) -> type[hub_tqdm]:
    """Return a progress bar that shows nothing and reports the bytes of all files together."""
    done = 0

    class Reporting(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            if self._counts_bytes:
                done += int(n or 0)
                report(done)
            return None

    return Reporting
