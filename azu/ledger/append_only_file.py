"""Reads Redis's append-only file: where its last whole transfer ends, and what stands behind that."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from azu.errors import LedgerError

Command = tuple[bytes, ...]

_LENGTH_BYTES = 20
_NEXT_COMMAND = re.compile(rb"\r\n\*\d+\r\n\$\d+\r\n")
_RDB = b"REDIS"


@dataclass(frozen=True, slots=True)
class Reading:
    """A file's first `whole_bytes` are whole; of what follows, `unfinished` are the commands that are."""

    whole_bytes: int
    unfinished: tuple[Command, ...]


class _Torn(Exception):
    """The file ends within a command."""


def read(content: mmap | bytes) -> Reading:
    """Find the end of the last command, or last MULTI to EXEC, that is wholly in the file.

    Only a tail may be torn: raises LedgerError for anything else that is not a command, for damage with
    commands behind it, and for a file that begins with a snapshot.
    """
    if content[: len(_RDB)] == _RDB:
        raise LedgerError("the file begins with a snapshot (aof-use-rdb-preamble): use redis-check-aof")
    whole = 0
    unfinished: list[Command] = []
    for end, command in _commands(content):
        unfinished.append(command)
        if unfinished[0][0].upper() != b"MULTI" or command[0].upper() == b"EXEC":
            whole = end
            unfinished.clear()
    return Reading(whole, tuple(unfinished))


def _commands(content: mmap | bytes) -> Iterator[tuple[int, Command]]:
    """Yield each whole command with the offset behind it; stop at a torn tail."""
    position = 0
    while position < len(content):
        start = position
        try:
            command, position = _command(content, start)
        except _Torn:
            # A length that was damaged reads like a command that is longer than the file.
            if _NEXT_COMMAND.search(content, start + 1):
                raise LedgerError(f"the command at byte {start} is damaged, and others follow it") from None
            return
        yield position, command


def _command(content: mmap | bytes, position: int) -> tuple[Command, int]:
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


def _length(content: mmap | bytes, position: int, mark: bytes) -> tuple[int, int]:
    line = content[position : position + _LENGTH_BYTES]
    found = re.match(rb"%b(\d+)\r\n" % re.escape(mark), line)
    if found:
        return int(found[1]), position + found.end()
    if len(line) < _LENGTH_BYTES and re.fullmatch(rb"(?:%b(?:\d+\r?)?)?" % re.escape(mark), line):
        raise _Torn
    raise LedgerError(f"byte {position} begins neither a command nor an argument")
