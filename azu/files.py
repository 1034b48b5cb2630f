"""Files that people hand to azu: read within a limit, parsed, and refused by their name."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from azu.errors import ConfigurationError

# No honest one is larger; a longer one only costs whoever reads it.
MAX_DOCUMENT_BYTES = 4 * 1024 * 1024
# It lies beside azu in a checkout and in a wheel. By its name, a `configs` folder of the user could be found.
CONFIGS = Path(__file__).parents[1] / "configs"


def read_yaml(path: Path) -> Any:
    """Return what a YAML file says; raises ConfigurationError that names the file."""
    return _parsed(path, yaml.safe_load)


def read_json(path: Path) -> Any:
    """Return what a JSON file says; raises ConfigurationError that names the file."""
    return _parsed(path, json.loads)


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
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
        # Where the error is and not what stands there: the file may hold secrets.
        raise ConfigurationError(f"{path} is damaged: {_told(error)}") from error


def _told(error: ValueError | yaml.YAMLError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, line {error.lineno}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return "a value in it cannot be read"


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody but its owner can read, at no moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.rename(path)


@contextmanager
def replacing(path: Path, *, part: Path | None = None) -> Iterator[FileIO]:
    """Yield an unbuffered file that takes `path`'s name, on disk for good, when the block ends well.

    Until then it is `part`, by default the hidden `.<name>.part` beside it, removed when the block raises.
    """
    part = part or path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's names survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Write every byte; an unbuffered file may take fewer at once."""
    view = memoryview(content).cast("B")
    while view.nbytes:
        view = view[file.write(view) :]
