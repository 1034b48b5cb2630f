"""The ledger's files: how the store must be configured to keep them, and how a torn tail is cut off."""

import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from azu.errors import Conflict, LedgerError, NotFound
from azu.files import write_private_once
from azu.money.ledger.journal import JOURNAL

FileCommand = tuple[bytes, ...]

APPEND_ONLY_FILE = "appendonly.aof"
_APPEND_ONLY_FOLDER = "appendonlydir"
_MANIFEST = f"{APPEND_ONLY_FILE}.manifest"

# An acknowledged write is on disk; a damaged file is refused, never cut without a word; nothing is evicted.
DURABLE_CONFIG: Mapping[str, str] = {
    "appendonly": "yes",
    "appendfilename": APPEND_ONLY_FILE,
    "appendfsync": "always",
    # The server flushes each write also while it compacts the file.
    "no-appendfsync-on-rewrite": "no",
    "aof-load-truncated": "no",
    # Commands only: then `azu ledger repair` can read the file to its last byte.
    "aof-use-rdb-preamble": "no",
    "maxmemory-policy": "noeviction",
    "save": "",
}

_BLOCK_BYTES = 1 << 16
_LENGTH_BYTES = 20
_NEXT_COMMAND = re.compile(rb"\r\n\*\d+\r\n\$\d+\r\n")
_RDB = b"REDIS"


@dataclass(frozen=True, slots=True)
class FileRepair:
    """What was kept and what was cut off: nothing if `dropped_bytes` is 0.

    `dropped_transfers` are the ids of the transfers that can be read in the tail: they were not applied.
    `saved_to` is the file with the tail's bytes.
    """

    file: str
    kept_bytes: int
    dropped_bytes: int
    dropped_commands: int
    dropped_transfers: tuple[str, ...]
    saved_to: str | None


def append_only_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a store's folder in the order in which it reads them; it writes to the last one.

    A server since version 7 lists them in a manifest; an older one has a single file. Raises LedgerError for
    a manifest that names none.
    """
    manifest = folder / _APPEND_ONLY_FOLDER / _MANIFEST
    if not manifest.is_file():
        return (folder / APPEND_ONLY_FILE,)
    # Each line is pairs of a name and a value; files of type "h" are history, which the server removes.
    lines = [line.split() for line in manifest.read_text().splitlines()]
    named = [dict(zip(words[::2], words[1::2], strict=False)) for words in lines]
    files = tuple(manifest.parent / one["file"] for one in named if one.get("type") in ("b", "i"))
    if not files:
        raise LedgerError(f"{manifest} names no file")
    return files


def torn_file(files: Sequence[Path]) -> Path | None:
    """Return the file whose tail is torn, None if all are whole.

    Raises LedgerError for a file that is damaged elsewhere than at the end of all.
    """
    torn = None
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if torn is not None and size:
                raise LedgerError(f"{torn} is torn, and {path} has what came after it")
            if torn is None and _read(file.fileno(), path).whole_bytes < size:
                torn = path
    return torn


def repair(files: Sequence[Path]) -> FileRepair:
    """Cut a store's files, in their order, back to the last whole transfer; no server may be using them.

    Raises NotFound, Conflict if a process has one open, and LedgerError if one is damaged elsewhere than at
    the end of all. Then nothing was changed.
    """
    for path in files:
        if not path.is_file():
            raise NotFound(f"there is no file {path}")
    _refuse_if_open(files)
    path = torn_file(files) or files[-1]
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        reading = _read(file.fileno(), path)
        transfers = tuple(_transfer_ids(reading.unfinished))
        saved_to = None
        if reading.whole_bytes < size:
            file.seek(reading.whole_bytes)
            saved_to = _save(path, reading.whole_bytes, file.read())
            file.truncate(reading.whole_bytes)
            os.fsync(file.fileno())
    return FileRepair(
        file=str(path),
        kept_bytes=reading.whole_bytes,
        dropped_bytes=size - reading.whole_bytes,
        dropped_commands=len(reading.unfinished),
        dropped_transfers=transfers,
        saved_to=str(saved_to) if saved_to else None,
    )


@dataclass(frozen=True, slots=True)
class FileTail:
    """The first `whole_bytes` of a file are whole; `unfinished` are the whole commands after them."""

    whole_bytes: int
    unfinished: tuple[FileCommand, ...]


def read(content: mmap.mmap | bytes) -> FileTail:
    """Find the end of the last command, or last MULTI to EXEC, that is complete in the file.

    Only a tail may be torn. Raises LedgerError for anything else that is not a command, for damage with
    commands after it, and for a file that begins with a snapshot.
    """
    if content[: len(_RDB)] == _RDB:
        raise LedgerError("the file begins with a snapshot (aof-use-rdb-preamble): use redis-check-aof")
    whole = 0
    unfinished: list[FileCommand] = []
    for end, command in _commands(content):
        unfinished.append(command)
        if unfinished[0][0].upper() != b"MULTI" or command[0].upper() == b"EXEC":
            whole = end
            unfinished.clear()
    return FileTail(whole, tuple(unfinished))


def _read(descriptor: int, path: Path) -> FileTail:
    written = _written_bytes(descriptor)
    if written == 0:
        return FileTail(0, ())
    try:
        with mmap.mmap(descriptor, written, access=mmap.ACCESS_READ) as content:
            return read(content)
    except LedgerError as error:
        raise LedgerError(f"{path}: {error.message}") from error


def _written_bytes(descriptor: int) -> int:
    """Return the file's size without the zeros that a power cut may leave at its end."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - _BLOCK_BYTES)
        block = os.pread(descriptor, end - start, start).rstrip(b"\0")
        if block:
            return start + len(block)
        end = start
    return 0


def _save(path: Path, offset: int, tail: bytes) -> Path:
    """Write the tail beside the file before it is cut off; never overwrite the tail of an earlier repair."""
    aside = path.with_name(f"{path.name}.dropped-{offset}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.dropped-{offset}-{number}")
    write_private_once(aside, tail)
    return aside


def _transfer_ids(commands: tuple[FileCommand, ...]) -> Iterator[str]:
    for command in commands:
        if command[0].upper() == b"XADD" and command[1] == JOURNAL.encode():
            fields = dict(zip(command[3::2], command[4::2], strict=False))
            yield str(json.loads(fields[b"entry"])["transfer"]["id"])


def _refuse_if_open(files: Sequence[Path]) -> None:
    targets = {path.resolve() for path in files}
    for process in psutil.process_iter():
        try:
            opened = {Path(file.path) for file in process.open_files()}
        except psutil.Error:
            continue  # it ended meanwhile, or belongs to another user
        for path in targets & opened:
            raise Conflict(f"process {process.pid} has {path} open: stop it first")


class _Torn(Exception):
    """The file ends within a command."""


def _commands(content: mmap.mmap | bytes) -> Iterator[tuple[int, FileCommand]]:
    """Yield each whole command with the offset of its end; stop at a torn tail."""
    position = 0
    while position < len(content):
        start = position
        try:
            command, position = _command(content, start)
        except _Torn:
            # A damaged length looks like a command that is longer than the file.
            if _NEXT_COMMAND.search(content, start + 1):
                raise LedgerError(f"the command at byte {start} is damaged, and others follow it") from None
            return
        yield position, command


def _command(content: mmap.mmap | bytes, position: int) -> tuple[FileCommand, int]:
    start = position
    count, position = _length(content, start, b"*")
    if count == 0:
        raise LedgerError(f"the command at byte {start} is empty")
    arguments = []
    for _ in range(count):
        size, position = _length(content, position, b"$")
        end = position + size
        if end + 2 > len(content):
            raise _Torn
        if content[end : end + 2] != b"\r\n":
            raise LedgerError(f"byte {end} does not end an argument")
        arguments.append(content[position:end])
        position = end + 2
    return tuple(arguments), position


def _length(content: mmap.mmap | bytes, position: int, mark: bytes) -> tuple[int, int]:
    line = content[position : position + _LENGTH_BYTES]
    found = re.match(rb"%b(\d+)\r\n" % re.escape(mark), line)
    if found:
        return int(found[1]), position + found.end()
    if len(line) < _LENGTH_BYTES and re.fullmatch(rb"(?:%b(?:\d+\r?)?)?" % re.escape(mark), line):
        raise _Torn
    raise LedgerError(f"byte {position} begins neither a command nor an argument")
