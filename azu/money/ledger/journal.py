"""The journal: hash-chained lines in one stream of Redis, and how a line follows from the books before it.

`azu:ledger:journal`  stream, an entry's number as its id: the entry's text, and a SHA-256 over the hash
                      before it and the text. Its first lines move into files when they are sealed.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from redis import RedisError
from redis.asyncio import Redis

from azu.errors import AzuError, JournalFault, LedgerError
from azu.money.ledger.entry import Entry, Leg
from azu.money.ledger.posting import apply_once
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import Account, AnyTransfer, Transfer, encode_transfer
from azu.redis_client import connect_redis

JOURNAL = "azu:ledger:journal"
# The largest entries are some 40 KiB: a page of them is read before Redis counts as away.
_PAGE = 128


@dataclass(frozen=True, slots=True)
class Head:
    """An entry's number and hash: they stand for the entry and all before it. `BEGIN` is before the first."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    number: int = 0
    hash: str = ""


BEGIN = Head()


@dataclass(frozen=True, slots=True)
class Line:
    """An entry as it is stored."""

    number: int
    text: str
    hash: str

    @property
    def head(self) -> Head:
        """What the next line follows."""
        return Head(self.number, self.hash)


@dataclass(frozen=True, slots=True)
class _Content:
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    number: int
    at_ms: int
    transfer: AnyTransfer
    legs: list[tuple[str, int]]


_CONTENT = TypeAdapter(_Content)


def changed(message: str) -> JournalFault:
    """Return the error for entries that are not what this ledger wrote."""
    return JournalFault(message, code="journal_changed")


def next_hash(before: str, text: str) -> str:
    """Return the hash of an entry's text that follows an entry with the hash `before`."""
    return sha256(f"{before}{text}".encode()).hexdigest()


def write_line(before: Head, at_ms: int, transfer: Transfer, legs: Sequence[Leg]) -> Line:
    """Return the line of a transfer that is applied after `before`."""
    number = before.number + 1
    booked = json.dumps([(leg.account, leg.lamports) for leg in legs], separators=(",", ":"))
    text = f'{{"number":{number},"at_ms":{at_ms},"transfer":{encode_transfer(transfer)},"legs":{booked}}}'
    return Line(number, text, next_hash(before.hash, text))


def read_line(line: Line) -> Entry:
    """Return the entry of a line; raises JournalFault if the line is damaged."""
    try:
        content = _CONTENT.validate_json(line.text)
    except (ValidationError, LedgerError) as error:
        raise changed(f"journal entry {line.number} is damaged: {line.text[:200]!r}") from error
    legs = tuple(Leg(Account(account), lamports) for account, lamports in content.legs)
    return Entry(content.number, content.transfer, legs, content.at_ms, line.hash)


def check_line(before: Head, line: Line) -> Head:
    """Return the head after a line; raises JournalFault if the line does not join `before`."""
    if line.number != before.number + 1:
        raise changed(f"journal entry {line.number} comes where {before.number + 1} is missing")
    if line.hash != next_hash(before.hash, line.text):
        raise changed(f"journal entry {line.number} was changed, or one before it")
    return line.head


def follow(state: BooksState, before: Head, line: Line) -> Entry:
    """Bring the books from `before` to the state after a line; raises JournalFault if it cannot follow."""
    check_line(before, line)
    entry = read_line(line)
    try:
        legs = apply_once(state, entry.transfer, entry.at_ms)
    except AzuError as error:
        raise changed(f"journal entry {line.number}: {error.message}") from error
    if legs != entry.legs or entry.number != line.number:
        raise changed(f"journal entry {line.number} booked {_told(entry)}, which is not what it says")
    return entry


def _told(entry: Entry) -> str:
    return ", ".join(f"{leg.lamports:+} on {leg.account}" for leg in entry.legs) or "nothing"


class RedisJournal:
    """The lines that are not sealed away. Every method raises Unavailable when Redis does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._append = redis.register_script(files(__package__).joinpath("append.lua").read_text())

    @classmethod
    def from_url(cls, url: str) -> "RedisJournal":
        """Return the journal in the Redis at `url`; it connects when it is first used."""
        return cls(connect_redis(url))

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def append(self, head: Head, lines: Sequence[Line]) -> Head:
        """Write lines after `head`; return the stored head, which is another if they were not written.

        When Unavailable is raised they may be written, or be written later.
        """
        arguments: list[str | int] = [head.number, head.hash]
        for line in lines:
            arguments += (line.number, line.text, line.hash)
        number, last_hash = await self._answer(self._append([JOURNAL], arguments))
        return Head(_number(number), last_hash)

    async def head(self) -> Head:
        """Return the last stored line's head."""
        return await self.append(Head(-1), ())

    async def first(self) -> int:
        """Return the first stored line's number, 0 if there is none."""
        rows = await self._answer(self._redis.xrange(JOURNAL, count=1))
        return _line(*rows[0]).number if rows else 0

    async def lines(self, after: int = 0, through: int | None = None) -> AsyncIterator[Line]:
        """Yield the stored lines with numbers above `after`, up to `through` or to the last one."""
        while True:
            last = "+" if through is None else f"{through}-0"
            rows = await self._answer(self._redis.xrange(JOURNAL, f"{after + 1}-0", last, count=_PAGE))
            for row in rows:
                line = _line(*row)
                after = line.number
                yield line
            if len(rows) < _PAGE:
                return

    async def trim(self, through: int) -> None:
        """Remove the lines up to a number."""
        await self._answer(self._redis.xtrim(JOURNAL, minid=f"{through + 1}-0", approximate=False))

    async def _answer(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except RedisError as error:
            raise JournalFault(f"the ledger's Redis refused: {error}") from error


def _line(stream_id: str, fields: dict[str, str]) -> Line:
    if fields.keys() != {"entry", "hash"}:
        raise changed(f"journal entry {stream_id} is damaged: {fields}")
    return Line(_number(stream_id.removesuffix("-0")), fields["entry"], fields["hash"])


def _number(text: str) -> int:
    if not text.isdecimal():
        raise changed(f"the journal has an entry {text!r}, which no ledger wrote")
    return int(text)
