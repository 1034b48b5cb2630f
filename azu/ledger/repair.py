"""Cuts a torn tail off Redis's append-only file, keeps it aside, and says what it held."""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from azu.errors import Conflict, LedgerError, NotFound
from azu.ledger.append_only_file import Command, Reading, read
from azu.ledger.records import JOURNAL
from azu.ledger.transfers import decode_transfer

_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Repair:
    """What was kept and what was cut off: nothing if `dropped_bytes` is 0.

    `dropped_transfers` are the ids of transfers that can be read in the tail: they have not happened.
    `saved_to` holds the tail's bytes.
    """

    file: str
    kept_bytes: int
    dropped_bytes: int
    dropped_commands: int
    dropped_transfers: tuple[str, ...]
    saved_to: str | None


def repair(path: Path) -> Repair:
    """Cut an append-only file back to its last whole transfer; no server may be using it.

    Raises NotFound, Conflict if a process has the file open, and LedgerError if it is damaged elsewhere than
    at its end: then nothing was changed.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    _refuse_if_open(path)
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
    return Repair(
        file=str(path),
        kept_bytes=reading.whole_bytes,
        dropped_bytes=size - reading.whole_bytes,
        dropped_commands=len(reading.unfinished),
        dropped_transfers=transfers,
        saved_to=str(saved_to) if saved_to else None,
    )


def _read(descriptor: int, path: Path) -> Reading:
    written = _written_bytes(descriptor)
    if written == 0:
        return Reading(0, ())
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
    """Write the tail beside the file before it is cut off; an earlier repair's is never overwritten."""
    aside = path.with_name(f"{path.name}.dropped-{offset}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.dropped-{offset}-{number}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(tail)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)
    return aside


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _transfer_ids(commands: tuple[Command, ...]) -> Iterator[str]:
    for command in commands:
        if command[0].upper() == b"XADD" and command[1] == JOURNAL.encode():
            fields = dict(zip(command[3::2], command[4::2], strict=False))
            yield decode_transfer(fields[b"transfer"].decode()).id


def _refuse_if_open(path: Path) -> None:
    target = path.resolve()
    for process in psutil.process_iter():
        try:
            files = process.open_files()
        except psutil.Error:
            continue  # gone meanwhile, or somebody else's
        if any(Path(file.path) == target for file in files):
            raise Conflict(f"process {process.pid} has {path} open: stop it first")
