"""Files that are either whole under their name or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


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
