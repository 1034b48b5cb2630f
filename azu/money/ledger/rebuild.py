"""How the books come back at a start: from the last seal and the journal, or from the seals alone."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from azu.errors import JournalFault
from azu.money.ledger.entry import Entry
from azu.money.ledger.journal import BEGIN, Head, Line, RedisJournal, changed, follow, write_line
from azu.money.ledger.seals import Seals
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import JournalSealed, LossNoted, Transfer


@dataclass(slots=True)
class Rebuilt:
    """The books after `head`; `anchor` is the last sealed entry.

    `ids` has those of the entries after it, `num_bytes` is how long they are together, or less.
    """

    state: BooksState = field(default_factory=BooksState)
    head: Head = BEGIN
    anchor: Head = BEGIN
    ids: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0

    def take(self, line: Line) -> None:
        """Go on to a line; raises JournalFault if it does not follow."""
        self.wrote(line, follow(self.state, self.head, line))

    def wrote(self, line: Line, entry: Entry) -> None:
        """Note that a line whose changes the state has is the last one."""
        self.head = line.head
        self.ids[entry.transfer.id] = entry.number
        self.num_bytes += len(line.text)

    def sealed(self, through: Head) -> None:
        """Forget the ids up to the last sealed entry: the seals know them."""
        self.ids = {id_: number for id_, number in self.ids.items() if number > through.number}
        self.anchor = through
        self.num_bytes = 0


async def rebuild(journal: RedisJournal, seals: Seals, known: Head, now_ms: Callable[[], int]) -> Rebuilt:
    """Return the books as the store has them; note in the journal how much of what was `known` is gone.

    A store that lost entries which are sealed goes on after the last of them. Raises JournalFault, code
    `journal_changed`, if an entry or a seal was changed, and if they are not of one ledger.
    """
    first, stored, files = await journal.first(), await journal.head(), seals.numbers()
    is_behind = bool(files) and files[-1] > stored.number
    if is_behind:
        books = await asyncio.to_thread(_from_files, seals, stored)
        through, digest = books.head.number, seals.sha256(books.head.number)
        sealed = JournalSealed(id=f"sealed:{through}", through=through, sha256=digest)
        await _write(journal, books, stored, sealed, now_ms())
    elif first > 1:
        seal = await asyncio.to_thread(seals.read, first - 1)
        books = Rebuilt(seal.state, seal.through, seal.through)
    else:
        books = Rebuilt()
    hashes = {books.head.number: books.head.hash}
    async for line in journal.lines(books.head.number):
        books.take(line)
        hashes[line.number] = line.hash
    await asyncio.to_thread(_check_files, seals, books, hashes)
    await journal.trim(books.anchor.number)
    if known.number and known.number not in hashes and known.number <= books.anchor.number:
        old = await asyncio.to_thread(seals.line, known.number)
        hashes[known.number] = "" if old is None else old.hash
    if is_behind or hashes.get(known.number, "") != known.hash:
        lost = max(1, known.number - books.head.number)
        noted = LossNoted(id=f"loss:{secrets.token_hex(16)}", num_entries=lost)
        await _write(journal, books, books.head, noted, now_ms())
    return books


def _from_files(seals: Seals, stored: Head) -> Rebuilt:
    """Rebuild the books from the files, which know more than the store."""
    line = seals.line(stored.number) if stored.number else None
    if line is not None and line.hash != stored.hash:
        raise changed("the sealed entries are not of this journal")
    books = Rebuilt()
    for number in seals.numbers():
        for line in seals.lines(number):
            books.take(line)
    books.sealed(books.head)
    return books


def _check_files(seals: Seals, books: Rebuilt, hashes: dict[int, str]) -> None:
    """Compare the files with what the journal says of them; remove those whose sealing was cut off."""
    said = {int(through): digest for through, digest in books.state.seals.items()}
    last = max(said, default=0)
    if last < books.anchor.number or (last and seals.sha256(last) != said[last]):
        raise changed(f"the sealed entries up to {last} were changed")
    if last > books.anchor.number:
        books.sealed(Head(last, hashes[last]))
    for number in seals.numbers():
        if number <= last:
            continue
        if seals.read(number).through.hash != hashes.get(number):
            raise changed("the sealed entries are not of this journal")
        seals.remove(number)
    seals.check_ids(books.anchor.number)


async def _write(
    journal: RedisJournal, books: Rebuilt, stored: Head, transfer: Transfer, now_ms: int
) -> None:
    """Write a transfer that moves nothing as the next entry, into a store that ends with `stored`.

    It is not dated before the last one: the chain's time may not be known yet.
    """
    line = write_line(books.head, max(now_ms, books.state.facts.get("at_ms", 0)), transfer, ())
    if await journal.append(stored, [line]) != line.head:
        raise JournalFault("another process writes this journal", code="another_writer")
    books.take(line)
