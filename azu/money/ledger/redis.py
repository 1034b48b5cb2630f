"""The ledger in Redis: the rules work a transfer out, then one script writes all of it or nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import cast

from redis import RedisError
from redis.asyncio import Redis

from azu.errors import LedgerError
from azu.money.ledger.losses import Losses, Mark, entries_lost
from azu.money.ledger.records import (
    BALANCES,
    ENTRIES,
    EXPIRIES,
    HOLDS,
    JOURNAL,
    KEYS,
    Snapshot,
    entry_from_stream,
    script_arguments,
    whole_numbers,
)
from azu.money.ledger.rules import (
    Entry,
    Posting,
    Reservation,
    Result,
    decode_hold,
    hold_name,
    post,
    refusal,
    repeat,
    reservation_name,
)
from azu.money.ledger.transfers import Transfer
from azu.redis_client import connect_redis

_PAGE = 500
# More calls at once wait here: the client's connections are bounded, and a call without one would fail.
_AT_ONCE = 32
_FORGET = """
for _, name in ipairs(ARGV) do
  local hold = redis.call('HGET', KEYS[1], name)
  if hold and cjson.decode(hold).ended_by ~= cjson.null then redis.call('HDEL', KEYS[1], name) end
end
return 1
"""
# A hold changes twice in its life, so a caller that loses every race has read it three times; and once more
# where Redis lost entries.
_ATTEMPTS = 4


class RedisLedger:
    """Applies transfers in one Redis; any number of processes may share it.

    Every method raises Unavailable when Redis does not answer. A transfer may then have been applied; it is
    safe to send it again unchanged. A transfer is applied also where Redis lost entries; `losses` says so.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self.losses = Losses(redis)
        self._forget = redis.register_script(_FORGET)
        self._script = redis.register_script(files(__package__).joinpath("apply.lua").read_text())

    @classmethod
    def from_url(cls, url: str) -> "RedisLedger":
        """Return the ledger in the Redis at `url`; it connects when it is first used."""
        return cls(connect_redis(url))

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def apply(self, transfer: Transfer) -> Result:
        """Apply a transfer once; return the first result for a repeated one.

        Raises TransferConflict, InsufficientBalance and LedgerError as the rules do; then nothing changed.
        """
        async with self._access():
            for _ in range(_ATTEMPTS):
                found = await self._hold_text(hold_name(transfer))
                try:
                    posting = post(transfer, decode_hold(found) if found else None)
                except LedgerError:
                    # A transfer that was applied before finds its hold in the state after it.
                    if repeated := await self._repeated(transfer):
                        return repeated
                    raise
                if result := await self._write(posting, found):
                    return result
        raise LedgerError(f"{transfer.id}: its hold changed more often than a hold can")

    async def balance(self, account: str) -> int:
        """Return an account's lamports; zero for an account without entries."""
        return (await self.balances_of(account))[0]

    async def balances_of(self, *accounts: str) -> tuple[int, ...]:
        """Return the lamports of several accounts at one moment."""
        async with self._access():
            values = await cast(Awaitable[list[str | None]], self._redis.hmget(BALANCES, list(accounts)))
        stored = {account: value or "0" for account, value in zip(accounts, values, strict=True)}
        return tuple(whole_numbers(stored)[account] for account in accounts)

    async def balances(self) -> Mapping[str, int]:
        """Return the lamports of every account that has entries, at one moment."""
        async with self._access():
            return whole_numbers(await cast(Awaitable[dict[str, str]], self._redis.hgetall(BALANCES)))

    async def reservation(self, job_id: str) -> Reservation | None:
        """Return a job's reservation, None if there was never one or it ended and was forgotten."""
        async with self._access():
            found = await self._hold_text(reservation_name(job_id))
        return _reservation(found) if found else None

    async def forget(self, job_ids: Sequence[str]) -> None:
        """Delete what is stored of jobs' reservations that have ended; the journal keeps their entries."""
        async with self._access():
            await self._forget([HOLDS], [reservation_name(job_id) for job_id in job_ids])

    async def expired(self, now_ms: int) -> list[Reservation]:
        """Return the open reservations that expire up to now, the oldest first."""
        async with self._access():
            names = cast(list[str], await self._redis.zrangebyscore(EXPIRIES, "-inf", now_ms))
            contents = await cast(Awaitable[list[str]], self._redis.hmget(HOLDS, names)) if names else []
        found = [_reservation(content) for content in contents]
        # One may have ended between the two reads.
        return [reservation for reservation in found if reservation.ended_by is None]

    async def result(self, transfer_id: str) -> Result | None:
        """Return what a transfer did, or None if it was never applied."""
        async with self._access():
            entry = await self._entry_of(transfer_id)
        return Result(entry) if entry else None

    async def journal(self, after: int = 0) -> AsyncIterator[Entry]:
        """Yield the entries with numbers above `after`, entries that are written meanwhile included."""
        while True:
            async with self._access():
                entries = await self._entries(f"{after + 1}-0", "+")
            for entry in entries:
                yield entry
            if len(entries) < _PAGE:
                return
            after = entries[-1].number

    async def snapshot(self) -> Snapshot:
        """Return everything that is stored beside the journal, at one moment."""
        async with self._access(), self._redis.pipeline(transaction=True) as read:
            for hash_key in (BALANCES, HOLDS, ENTRIES):
                read.hgetall(hash_key)
            read.zrange(EXPIRIES, 0, -1, withscores=True)
            read.xlen(JOURNAL)
            balances, holds, numbers, expiries, length = await read.execute()
        return Snapshot(
            balances=whole_numbers(balances),
            holds={name: decode_hold(content) for name, content in holds.items()},
            numbers=whole_numbers(numbers),
            expiries={name: int(expires_at_ms) for name, expires_at_ms in expiries},
            length=length,
        )

    @asynccontextmanager
    async def _access(self) -> AsyncIterator[None]:
        async with self._slots:
            try:
                yield
            except RedisError as error:
                raise LedgerError(f"the ledger's Redis refused: {error}") from error

    async def _hold_text(self, name: str) -> str:
        if not name:
            return ""
        return await cast(Awaitable[str | None], self._redis.hget(HOLDS, name)) or ""

    async def _write(self, posting: Posting, found: str) -> Result | None:
        """Write a posting; return None if its hold has changed since it was read, or Redis lost entries."""
        transfer, mark = posting.transfer, self.losses.mark
        arguments = script_arguments(posting, found, mark.transfer_id, mark.number)
        answer = await self._script(KEYS, list(arguments))
        match answer:
            case ["posted", number, at_ms]:
                self.losses.answered(Mark(int(number), transfer.id, int(at_ms)))
                return Result(Entry(int(number), transfer, posting.legs, int(at_ms)))
            case ["known"]:
                return await self._repeated(transfer)
            case ["changed"]:
                return None
            case ["lost", length]:
                await self.losses.note(mark, entries=entries_lost(mark, 0, length))
                return None
            case ["refused", index, balance]:
                leg = posting.legs[index]
                raise refusal(transfer, leg, whole_numbers({leg.account: balance})[leg.account])
        raise LedgerError(f"the script answered {answer!r}")

    async def _repeated(self, transfer: Transfer) -> Result | None:
        entry = await self._entry_of(transfer.id)
        return repeat(entry, transfer) if entry else None

    async def _entry_of(self, transfer_id: str) -> Entry | None:
        number = await cast(Awaitable[str | None], self._redis.hget(ENTRIES, transfer_id))
        return await self._entry(number) if number else None

    async def _entry(self, number: str) -> Entry:
        entries = await self._entries(f"{number}-0", f"{number}-0")
        if not entries:
            raise LedgerError(f"journal entry {number} is missing")
        return entries[0]

    async def _entries(self, first: str, last: str) -> list[Entry]:
        rows = await self._redis.xrange(JOURNAL, first, last, count=_PAGE)
        return [entry_from_stream(*row) for row in cast(list[tuple[str, dict[str, str]]], rows)]


def _reservation(content: str) -> Reservation:
    hold = decode_hold(content)
    if not isinstance(hold, Reservation):
        raise LedgerError(f"not a reservation: {hold}")
    return hold
