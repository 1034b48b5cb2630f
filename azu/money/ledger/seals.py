"""Files of old entries, so that Redis holds only the latest, and the ids that were ever used.

    {through}.jsonl  {"after": number, "hash": ...}, then the lines ["hash", {entry}], then
                     {"through": number, "hash": ..., "state": {the books after it}}
    ids.sqlite       transfer id -> number, of all sealed entries; it can be made again from the files
    head.json        the last entry that was seen in the journal, to notice a journal that went back

The journal's entry `JournalSealed` has the SHA-256 of its file.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from azu.errors import ConfigurationError, LedgerError, Unavailable
from azu.files import disk_errors, replacing, write_all
from azu.money.ledger.journal import BEGIN, Head, Line, changed, read_line
from azu.money.ledger.state import BooksState, decode_state

_DIGITS = 15
_ID_BYTES = 16
_HEAD = TypeAdapter(Head)
_HASH_END = 2 + 64


@dataclass(frozen=True, slots=True)
class Seal:
    """One file: what its first line follows, its last line's head, and the books after it."""

    after: Head
    through: Head
    state: BooksState
    sha256: str


class Seals:
    """The files in one folder, of one ledger. Its methods block: they read and write files.

    What writes raises Unavailable, code `disk_failed`, where the disk is full; nothing has changed then.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with _disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ids = _ids_in(folder / "ids.sqlite")

    def close(self) -> None:
        """Close the index of ids."""
        self._ids.close()

    def numbers(self) -> list[int]:
        """Return the last number of each file, in order."""
        return sorted(int(path.stem) for path in self._folder.glob("[0-9]*.jsonl"))

    def write(self, after: Head, through: Head, lines: Iterable[Line], state: bytes) -> str:
        """Write a file, and its ids into the index; return its SHA-256. A file of the same end is replaced.

        Raises JournalFault if the lines do not lead from `after` to `through`.
        """
        digest, ids, head = sha256(), [], after
        path = self._path(through.number)
        with _disk_errors(self._folder), replacing(path) as file:

            def put(content: bytes) -> None:
                digest.update(content)
                write_all(file, content)

            put(json.dumps({"after": after.number, "hash": after.hash}).encode() + b"\n")
            for line in lines:
                put(f'["{line.hash}",{line.text}]\n'.encode())
                ids.append((_digest(read_line(line).transfer.id), line.number))
                head = line.head
            if head != through:
                raise changed(f"the journal's lines lead to {head}, not to {through}")
            last = json.dumps({"through": through.number, "hash": through.hash})
            put(last.removesuffix("}").encode() + b', "state": ' + state + b"}\n")
        try:
            self._index(ids)
        except Unavailable:
            self.remove(through.number)
            raise
        return digest.hexdigest()

    def read(self, through: int) -> Seal:
        """Return what a file says; raises JournalFault if it is damaged."""
        path = self._path(through)
        try:
            content = path.read_bytes()
            first, last = content[: content.index(b"\n")], content[content.rindex(b"\n", 0, -1) + 1 :]
            begin = json.loads(first)
            head, _, state = last.partition(b', "state": ')
            end = json.loads(head + b"}")
            return Seal(
                Head(begin["after"], begin["hash"]),
                Head(end["through"], end["hash"]),
                decode_state(state.removesuffix(b"}\n")),
                sha256(content).hexdigest(),
            )
        except (OSError, ValueError, KeyError, TypeError, LedgerError) as error:
            raise changed(f"the sealed entries in {path} cannot be read: {error}") from error

    def sha256(self, through: int) -> str:
        """Return a file's SHA-256; empty if it cannot be read."""
        try:
            with self._path(through).open("rb") as file:
                digest = sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
                return digest.hexdigest()
        except OSError:
            return ""

    def lines(self, through: int) -> Iterator[Line]:
        """Yield a file's lines; raises JournalFault, code `journal_changed`, for what is none."""
        path = self._path(through)
        try:
            with path.open(encoding="utf-8") as file:
                number = json.loads(file.readline())["after"]
                for stored in file:
                    if stored.startswith('{"through"'):
                        return
                    number += 1
                    if not (stored.startswith('["') and stored.endswith("]\n")):
                        raise changed(f"sealed entry {number} is damaged: {stored[:200]!r}")
                    yield Line(number, stored[_HASH_END + 2 : -2], stored[2:_HASH_END])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise changed(f"the sealed entries in {path} cannot be read: {error}") from error

    def line(self, number: int) -> Line | None:
        """Return the line of a sealed entry, None if no file has it."""
        through = next((last for last in self.numbers() if last >= number), None)
        if through is None:
            return None
        return next((line for line in self.lines(through) if line.number == number), None)

    def number_of(self, transfer_id: str, through: int) -> int | None:
        """Return the number of the sealed entry, up to `through`, in which an id was used."""
        row = self._ids.execute("SELECT number FROM ids WHERE digest = ?", (_digest(transfer_id),)).fetchone()
        return row[0] if row is not None and row[0] <= through else None

    def check_ids(self, through: int) -> None:
        """Make the index of ids again if it has not exactly the ids of the entries up to `through`."""
        try:
            count, last = self._ids.execute("SELECT COUNT(*), MAX(number) FROM ids").fetchone()
        except sqlite3.DatabaseError:
            count = last = None
        if (count, last or 0) == (through, through):
            return
        self._ids.close()
        (self._folder / "ids.sqlite").unlink()
        self._ids = _ids_in(self._folder / "ids.sqlite")
        for number in self.numbers():
            if number <= through:
                lines = self.lines(number)
                self._index((_digest(read_line(line).transfer.id), line.number) for line in lines)

    def has_ids_of(self, through: int) -> bool:
        """Whether the index has each id of one file."""
        return all(
            self.number_of(read_line(line).transfer.id, through) == line.number
            for line in self.lines(through)
        )

    def remove(self, through: int) -> None:
        """Remove a file whose entries the journal still has."""
        self._path(through).unlink()

    def mark(self) -> Head:
        """Return the entry that was noted last."""
        path = self._folder / "head.json"
        if not path.exists():
            return BEGIN
        try:
            return _HEAD.validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigurationError(
                f"{path} cannot be read; it says how far the ledger was: move it away only after "
                "`azu ledger audit` agrees with the chain"
            ) from error

    def note(self, head: Head) -> None:
        """Note the last entry."""
        with _disk_errors(self._folder), replacing(self._folder / "head.json") as file:
            write_all(file, _HEAD.dump_json(head))

    def _index(self, ids: Iterable[tuple[bytes, int]]) -> None:
        with _disk_errors(self._folder), self._ids:
            self._ids.executemany("INSERT OR REPLACE INTO ids VALUES (?, ?)", ids)

    def _path(self, through: int) -> Path:
        return self._folder / f"{through:0{_DIGITS}d}.jsonl"


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raise what a failing disk raises as Unavailable; SQLite has errors of its own for it."""
    try:
        with disk_errors(folder):
            yield
    except sqlite3.OperationalError as error:
        raise Unavailable(f"ids.sqlite: {error}", code="disk_failed") from error


def _ids_in(path: Path) -> sqlite3.Connection:
    """Open an index of ids; one that cannot be read is empty, and `check_ids` fills it."""
    # A seal is written in a thread, while the loop looks ids up.
    ids = sqlite3.connect(path, check_same_thread=False)
    table = "CREATE TABLE IF NOT EXISTS ids (digest BLOB PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID"
    try:
        ids.execute(table)
    except sqlite3.DatabaseError:
        ids.close()
        path.unlink()
        ids = sqlite3.connect(path, check_same_thread=False)
        ids.execute(table)
    return ids


def _digest(transfer_id: str) -> bytes:
    return sha256(transfer_id.encode()).digest()[:_ID_BYTES]
