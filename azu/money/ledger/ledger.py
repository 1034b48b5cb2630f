"""The ledger: one writer, its books in memory, and one journal in which each transfer is written once."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from azu.clock import wall_clock_ms
from azu.errors import AzuError, JournalFault, LedgerError, Unavailable
from azu.money.ledger.audit import Audit, audit_books
from azu.money.ledger.entry import Entry, Result, repeat
from azu.money.ledger.journal import Head, Line, RedisJournal, changed, check_line, read_line, write_line
from azu.money.ledger.posting import post
from azu.money.ledger.rebuild import Rebuilt, rebuild
from azu.money.ledger.seals import Seals
from azu.money.ledger.state import BooksState, Draft, decode_state, encode_state
from azu.money.ledger.transfers import (
    Expire,
    JournalSealed,
    PayoutPaid,
    PayoutRefused,
    Release,
    Settle,
    Transfer,
    WriterOpened,
)
from azu.supervision import as_known_error
from azu.units import KIB

# The most transfers that one call of the script writes.
_GROUP = 256
_ATTEMPTS = 3
# A settlement with a few shares has about 1 KiB.
_USUAL_BYTES = KIB

_Caller = asyncio.Future[Entry | int]  # an entry that was written now, or the number of a known one
_Answer = Entry | int | AzuError


@dataclass(frozen=True, slots=True)
class _Group:
    """Transfers that were worked out together: their lines, and the answer for each caller."""

    draft: Draft
    lines: tuple[Line, ...]
    answers: tuple[tuple[_Caller, _Answer], ...]


class Ledger:
    """Applies transfers one after the other, many in one write; only one process may have it open.

    Every asynchronous method raises Unavailable when Redis does not answer. A transfer may then have been
    applied; it is safe to send it again unchanged. Once another process has written the journal, every call
    of `apply` raises JournalFault, code `another_writer`. The ledger goes on with a store that went back;
    `lost` says by how many entries.
    """

    def __init__(
        self, journal: RedisJournal, seals: Seals, books: Rebuilt, now_ms: Callable[[], int]
    ) -> None:
        self._journal = journal
        self._seals = seals
        self._books = books
        self._now_ms = now_ms
        self._waiting: list[tuple[Transfer, _Caller]] = []
        self._writing: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._sealing = asyncio.Lock()
        # Lines that were sent after the head, and may be written or not.
        self._unsure: list[tuple[Line, ...]] = []
        self._closed: AzuError | None = None
        self._looks = 0
        # Whether the chain's time was heard.
        self.is_timed = False

    @classmethod
    async def open(
        cls, journal: RedisJournal, seals: Seals, now_ms: Callable[[], int] = wall_clock_ms
    ) -> "Ledger":
        """Rebuild the books from the last seal and the journal, and take the right to write from others.

        Raises JournalFault if an entry or a seal was changed or is missing.
        """
        ledger = cls(journal, seals, await rebuild(journal, seals, seals.mark(), now_ms), now_ms)
        await ledger.apply(WriterOpened(id=f"writer:{secrets.token_hex(16)}"))
        seals.note(ledger.head)
        return ledger

    @property
    def state(self) -> BooksState:
        """The books after the last entry: only to be read, and only until the next `await`."""
        return self._books.state

    @property
    def head(self) -> Head:
        """The last entry's number and hash."""
        return self._books.head

    @property
    def lost(self) -> int:
        """By how many entries the store went back; 0 if it never did, or an admin accepted it."""
        return self.state.facts.get("lost", 0)

    def now_ms(self) -> int:
        """Return the time that the next entry gets, in milliseconds since 1970.

        Until the chain's time was heard it is not before the last entry's: a clock that starts behind would
        have all that waits become due as soon as it is right.
        """
        now_ms = self._now_ms()
        return now_ms if self.is_timed else max(now_ms, self.state.facts.get("at_ms", 0))

    async def close(self) -> None:
        """Wait for what is being written, note the head, close the connections and files."""
        is_writer, self._closed = self._closed is None, self._closed or Unavailable("the ledger was closed")
        if self._writing is not None:
            await self._writing
        if is_writer:
            self._seals.note(self.head)
        self._seals.close()
        await self._journal.close()

    async def apply(self, transfer: Transfer) -> Result:
        """Apply a transfer once; return the first result for a repeated one.

        Raises TransferConflict for a known id with other content, and what `post` raises, with code
        `hold_ended` for a job or payout that ended already. Then nothing has changed.
        """
        if self._closed is not None:
            raise self._closed
        number = self._number_of(transfer.id)
        if number is None:
            done: _Caller = asyncio.get_running_loop().create_future()
            self._waiting.append((transfer, done))
            if self._writing is None:
                self._writing = asyncio.create_task(self._write_waiting())
            written = await done
            if isinstance(written, Entry):
                return Result(written)
            number = written
        return repeat(await self.entry(number), transfer)

    async def result(self, transfer_id: str) -> Result | None:
        """Return what a transfer did, or None if it was never applied."""
        number = self._number_of(transfer_id)
        return None if number is None else Result(await self.entry(number))

    async def entry(self, number: int) -> Entry:
        """Return an entry, sealed ones too; raises JournalFault, code `journal_changed`, if there is none."""
        if number > self._books.anchor.number:
            async for line in self._journal.lines(number - 1, number):
                return read_line(line)
        sealed = await asyncio.to_thread(self._seals.line, number)
        if sealed is None:
            raise changed(f"journal entry {number} is missing")
        return read_line(sealed)

    async def hash_at(self, number: int) -> str:
        """Return the hash of an entry, empty if there is none."""
        return (await self.entry(number)).hash if 0 < number <= self.head.number else ""

    async def journal(self, after: int = 0) -> AsyncIterator[Entry]:
        """Yield the entries with numbers above `after`, sealed ones too."""
        for last in self._seals.numbers():
            if last > after:
                for line in self._seals.lines(last):
                    if line.number > after:
                        yield read_line(line)
                after = last
        async for line in self._journal.lines(after):
            yield read_line(line)

    async def audit(self, wallet_lamports: int | None = None, *, since: int = 0) -> Audit:
        """Rebuild the books from their entries and compare them with these, and with the chain's wallet.

        `since` is the last number of the seal to begin with; 0 begins with the first entry.
        """
        async with self._sealing:
            head, live = self.head, decode_state(encode_state(self.state))
            report = await audit_books(live, head, self._seals, self._journal, since, wallet_lamports)
        try:
            await self.verify()
        except JournalFault as error:
            report = replace(report, findings=(*report.findings, error.message))
        return report

    async def verify(self) -> None:
        """Read the journal since the last seal again, and look at two of the seals, at another each time.

        Raises JournalFault, code `journal_changed`, if one has changed since it was written.
        """
        anchor = self._books.anchor
        try:
            await self._check_journal()
        except JournalFault:
            if anchor == self._books.anchor:
                raise
            # Its first entries were moved into a file meanwhile.
            await self._check_journal()
        await asyncio.to_thread(self._check_seals, dict(self.state.seals))
        self._seals.note(self.head)

    async def seal(self, at_least: int = 1) -> None:
        """Move the entries up to now into a file with the books after them.

        They have to be so many, or as long as so many of the usual length.
        """
        async with self._sealing:
            books, after, through, state = (
                self._books, self._books.anchor, self.head, encode_state(self.state)
            )  # fmt: skip
            if through.number - after.number < at_least and books.num_bytes < at_least * _USUAL_BYTES:
                return
            lines = [line async for line in self._journal.lines(after.number, through.number)]
            digest = await asyncio.to_thread(self._seals.write, after, through, lines, state)
            if self._books is not books:
                self._seals.remove(through.number)
                return  # the store went back meanwhile
            await self.apply(
                JournalSealed(id=f"sealed:{through.number}", through=through.number, sha256=digest)
            )
            self._books.sealed(through)
            await self._journal.trim(through.number)

    async def _check_journal(self) -> None:
        head, before = self.head, self._books.anchor
        async for line in self._journal.lines(before.number, head.number):
            before = check_line(before, line)
        async with self._turn:
            stored = self.head if self._unsure else await self._journal.head()
            if before != head or stored != self.head:
                raise changed(
                    f"the journal leads to entry {before.number} and ends with {stored.number}; "
                    f"{self.head.number} was written last"
                )

    def _check_seals(self, said: dict[str, str]) -> None:
        """Read the last seal again, and one of the others with its ids."""
        if not said:
            return
        self._looks += 1
        numbers = sorted(map(int, said))
        other = numbers[self._looks % len(numbers)]
        for number in {numbers[-1], other}:
            if self._seals.sha256(number) != said[str(number)]:
                raise changed(f"the sealed entries up to {number} were changed")
        if not self._seals.has_ids_of(other):
            raise changed(f"the index lacks ids of the entries up to {other}")

    def _number_of(self, transfer_id: str) -> int | None:
        number = self._books.ids.get(transfer_id)
        return self._seals.number_of(transfer_id, self._books.anchor.number) if number is None else number

    async def _write_waiting(self) -> None:
        try:
            while self._waiting:
                taken, self._waiting = self._waiting[:_GROUP], self._waiting[_GROUP:]
                try:
                    async with self._turn:
                        await self._write(taken)
                except Exception as error:
                    for _, done in taken:
                        if not done.done():
                            done.set_exception(error)
        finally:
            self._writing = None

    async def _write(self, taken: Sequence[tuple[Transfer, _Caller]]) -> None:
        """Work transfers out, write all that are allowed in one call, and answer."""
        for _ in range(_ATTEMPTS):
            if self._closed is not None:
                raise self._closed
            if self._unsure:
                await self._find_out()
            group = self._work_out(taken)
            if not group.lines or await self._is_written(group):
                _answer(group)
                return
        raise Unavailable("the journal changed more often than a write is tried")

    def _work_out(self, taken: Sequence[tuple[Transfer, _Caller]]) -> _Group:
        draft, head = Draft(self.state, self.now_ms()), self.head
        lines: list[Line] = []
        new: dict[str, int] = {}
        answers: list[tuple[_Caller, _Answer]] = []
        for transfer, done in taken:
            if done.cancelled():
                continue
            known = new.get(transfer.id) or self._number_of(transfer.id)
            if known is not None:
                answers.append((done, known))
                continue
            try:
                try:
                    legs = post(draft, transfer)
                except AzuError as error:
                    answers.append((done, self._explained(transfer, error)))
                    continue
                line = write_line(head, draft.at_ms, transfer, legs)
            except Exception as error:
                # The draft may hold a part of this transfer: the others are worked out anew.
                answer = (done, as_known_error(error, f"the transfer {transfer.id}"))
                others = self._work_out([one for one in taken if one[1] is not done])
                return replace(others, answers=(answer, *others.answers))
            lines.append(line)
            head, new[transfer.id] = line.head, line.number
            answers.append((done, Entry(line.number, transfer, legs, draft.at_ms, line.hash)))
        return _Group(draft, tuple(lines), tuple(answers))

    async def _is_written(self, group: _Group) -> bool:
        """Write a group; return False if the journal does not end where this ledger does."""
        self._unsure.append(group.lines)
        stored = await self._journal.append(self.head, group.lines)
        if stored != group.lines[-1].head:
            return False
        self._unsure.clear()
        group.draft.keep()
        written = (answer for _, answer in group.answers if isinstance(answer, Entry))
        for line, entry in zip(group.lines, written, strict=True):
            self._books.wrote(line, entry)
        return True

    def _explained(self, transfer: Transfer, error: AzuError) -> AzuError:
        """Tell a hold that ended from one that never was: the books keep only open ones."""
        match transfer:
            case Settle() | Release() | Expire():
                opened = f"reserve:{transfer.job_id}"
            case PayoutPaid() | PayoutRefused():
                opened = f"{transfer.payout_id}:planned"
            case _:
                return error
        if error.code != "unknown_hold" or self._number_of(opened) is None:
            return error
        return LedgerError(f"{transfer.id}: this was ended before", code="hold_ended")

    async def _find_out(self) -> None:
        """Read what became of lines that were sent, and take over what is written of them.

        Raises JournalFault, code `another_writer`, if other lines follow the head. If the head itself is
        gone, the books are rebuilt from what the store has.
        """
        stored = [line async for line in self._journal.lines(max(self.head.number - 1, 0))]
        if self.head.number:
            if not stored or stored[0].head != self.head:
                self._books = await rebuild(self._journal, self._seals, self.head, self._now_ms)
                self._unsure.clear()
                return
            stored = stored[1:]
        sent = {lines[0].hash: list(lines) for lines in self._unsure}
        mine = sent.get(stored[0].hash, []) if stored else []
        if mine[: len(stored)] != stored:
            self._closed = JournalFault("another process writes this journal", code="another_writer")
            raise self._closed
        for line in stored:
            self._books.take(line)
        # What is not written may still come, as long as nothing else follows the head.
        if stored:
            self._unsure.clear()


def _answer(group: _Group) -> None:
    for done, answer in group.answers:
        if done.done():
            continue
        if isinstance(answer, AzuError):
            done.set_exception(answer)
        else:
            done.set_result(answer)
