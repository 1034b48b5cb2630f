"""Files on disk: documents read within a size limit, and files written whole or not at all."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import yaml

from azu.errors import ConfigurationError, Unavailable

T = TypeVar("T")
# No honest document is larger, and a larger one would only cost memory and time.
MAX_DOCUMENT_BYTES = 4 * 1024 * 1024
# It lies beside azu in a checkout and in a wheel; a look-up by name could find a user's folder `configs`.
CONFIGS = Path(__file__).parents[1] / "configs"


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; raises ConfigurationError that names the file."""
    return _parsed(path, yaml.safe_load)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises ConfigurationError that names the file."""
    return _parsed(path, json.loads)


def read_text(path: Path) -> str:
    """Return the text of a file; raises ConfigurationError that names the file."""
    return _parsed(path, str)


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner can ever read, and that survives a power cut.

    Missing folders are made, as private. What root makes belongs to the owner of the folder that it is in.
    """
    private_folder(path.parent)
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        _give_away(descriptor, path.parent)
        file.flush()
        os.fsync(descriptor)
    temporary.rename(path)
    _sync_folder(path.parent)


def private_folder(folder: Path) -> None:
    """Make a folder and those above it unless they exist; only their owner can enter the new ones.

    What root makes belongs to the owner of the folder that it is in.
    """
    if not folder.is_dir():
        private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _give_away(folder, folder.parent)


def _give_away(made: int | Path, folder: Path) -> None:
    if os.geteuid() == 0:
        owner = folder.stat()
        os.chown(made, owner.st_uid, owner.st_gid)


def write_private_once(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read and that survives a power cut.

    Raises FileExistsError when the path exists: what is there is never overwritten.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        write_all(file, content)
        os.fsync(file.fileno())
    _sync_folder(path.parent)


@contextmanager
def replacing(path: Path, *, part: Path | None = None, mode: int = 0o666) -> Iterator[FileIO]:
    """Yield an unbuffered file that takes `path`'s name when the block ends well, and survives a power cut.

    Until then its name is `part`, by default the hidden `.<name>.part` beside it, which is removed when the
    block raises.
    """
    part = part or path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb", buffering=0, opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        # A write to a full disk raises an error without a name.
        error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def disk_errors(home: Path) -> Iterator[None]:
    """Raise the block's OSErrors as Unavailable; a file under `home` is named by its path there."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # of a network or a lock
        path = Path(error.filename) if isinstance(error.filename, str) else home
        named = path.relative_to(home) if path.is_relative_to(home) else path.name
        raise Unavailable(f"{named}: {error.strerror}", code="disk_failed") from error


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Write every byte; one call of an unbuffered file's write may take fewer."""
    view = memoryview(content).cast("B")
    while view.nbytes:
        view = view[file.write(view) :]


def _parsed(path: Path, parse: Callable[[str], T]) -> T:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes")
        return parse(content.decode("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigurationError(f"{path} is nested too deeply") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} is damaged: {_fault(error)}") from error


def _fault(error: ValueError | yaml.YAMLError) -> str:
    """Return what is wrong and on which line, without the line's text: the file may hold secrets."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, line {error.lineno}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return "a value in it cannot be read"
