"""The shards on a node's disk, by their sha256."""

import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from azu.errors import ShardError
from azu.files import replacing, write_all

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_PART_SUFFIX = ".part"
# A part that no process has written to for this long belongs to a process that died.
_STALE_PART_S = 3600.0


class ShardCache:
    """A folder of verified shards; several processes may use it at once.

    A shard is a file, or a link to a file that was verified where it lies. A new file takes the place of
    those that were used least recently while a tenth of the disk is not free. `free_bytes` returns what may
    still be written; a file that a process has mapped stays.
    """

    def __init__(self, root: Path, free_bytes: Callable[[Path], int] | None = None) -> None:
        self._root = root
        self._free_bytes = free_bytes or _writable_bytes
        root.mkdir(parents=True, exist_ok=True)
        for part in root.glob(f"*{_PART_SUFFIX}"):
            _remove_if_stale(part)

    def path(self, sha256: str) -> Path | None:
        """Return the shard's file, or None when it is missing or was changed since it was verified."""
        entry = self._entry(sha256)
        if not _is_unchanged(entry):
            return None
        if not entry.is_symlink():
            os.utime(entry)  # the shard was used now
        return entry.resolve()

    def contents(self) -> frozenset[str]:
        """Return the sha256 of each shard in the cache."""
        return frozenset(
            entry.stem
            for entry in self._root.glob(f"*{_SUFFIX}")
            if _SHA256.fullmatch(entry.stem) and _is_unchanged(entry)
        )

    def store(self, sha256: str, size_bytes: int, chunks: Iterable[bytes]) -> Path:
        """Write a shard from its chunks and return its path.

        Raises ShardError when the chunks do not have `size_bytes` bytes in all or have another sha256; then
        nothing is kept.
        """
        if (present := self.path(sha256)) is not None:
            return present
        entry = self._entry(sha256)
        self._make_room(size_bytes)
        digest = hashlib.sha256()
        received = 0
        with replacing(entry, part=self._part()) as file:
            for chunk in chunks:
                received += len(chunk)
                if received > size_bytes:
                    raise ShardError(f"shard {sha256} is longer than its {size_bytes} bytes")
                digest.update(chunk)
                write_all(file, chunk)
            if received != size_bytes or digest.hexdigest() != sha256:
                raise ShardError(f"{received} bytes of shard {sha256} have the sha256 {digest.hexdigest()}")
        return entry

    def adopt(self, sha256: str, path: Path) -> Path:
        """Link to a file instead of copying it; the file is read once, to verify it.

        Raises ShardError when the file is not the shard.
        """
        entry = self._entry(sha256)
        if _is_unchanged(entry):
            return entry.resolve()
        with path.open("rb") as file:
            changed_at = os.fstat(file.fileno()).st_ctime_ns
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256 or path.stat().st_ctime_ns != changed_at:
            raise ShardError(f"{path.name} has the sha256 {found} instead of {sha256}")
        link = self._part()
        link.symlink_to(path.resolve())
        link.replace(entry)
        return entry.resolve()

    def _make_room(self, size_bytes: int) -> None:
        """Remove files, the one that was used least recently first, until `size_bytes` can be written."""
        lacking = size_bytes - self._free_bytes(self._root)
        if lacking <= 0:
            return
        mapped, found = _mapped_below(self._root.resolve()), []
        for file in self._root.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):  # another process removed it
                facts = file.lstat()
                if stat.S_ISREG(facts.st_mode) and file.name not in mapped:
                    found.append((facts.st_mtime_ns, facts.st_size, file))
        for _, num_bytes, file in sorted(found):
            if lacking > 0:
                file.unlink(missing_ok=True)
                lacking -= num_bytes

    def _entry(self, sha256: str) -> Path:
        if _SHA256.fullmatch(sha256) is None:
            raise ShardError(f"{sha256!r} is no sha256")
        return self._root / f"{sha256}{_SUFFIX}"

    def _part(self) -> Path:
        return self._root / f"{uuid.uuid4().hex}{_PART_SUFFIX}"


def within(most_bytes: int) -> Callable[[Path], int]:
    """Return what may still be written of so many bytes in a folder, as `ShardCache` asks for it."""

    def free_bytes(folder: Path) -> int:
        files = (file.lstat() for file in folder.glob(f"*{_SUFFIX}"))
        taken = sum(facts.st_size for facts in files if stat.S_ISREG(facts.st_mode))
        return min(_writable_bytes(folder), most_bytes - taken)

    return free_bytes


def _writable_bytes(folder: Path) -> int:
    """Return what may be written until a tenth of the disk is left."""
    disk = shutil.disk_usage(folder)
    return disk.free - disk.total // 10


def _mapped_below(folder: Path) -> set[str]:
    """Return the names of the files in a folder that processes of this machine have mapped."""
    names = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process ended, or is another user's
            names |= {
                line.rpartition("/")[2] for line in maps.read_text().splitlines() if f"{folder}/" in line
            }
    return names


def _is_unchanged(entry: Path) -> bool:
    """Return whether an entry exists and, if it is a link, its target is not newer than the link."""
    try:
        own = entry.lstat()
        # No process can set a file's change time back, so a target older than its link is what was verified.
        return not stat.S_ISLNK(own.st_mode) or entry.stat().st_ctime_ns <= own.st_ctime_ns
    except FileNotFoundError:
        return False


def _remove_if_stale(part: Path) -> None:
    try:
        if time.time() - part.lstat().st_mtime > _STALE_PART_S:
            part.unlink()
    except FileNotFoundError:
        pass  # another process finished or removed it
