"""What Redis lost of the ledger: a replica that was promoted, or a file whose tail was cut, knows less.

A process remembers the last entry of the journal that it was answered (a mark). Where Redis does not have
that entry any more, the process notes a loss in Redis and goes on. The treasury signs nothing until the admin
has accepted the loss.

`azu:ledger:loss`  hash: the numbers of a `Loss` while it is open, when it was noticed, the size that was
                   accepted; `settled_at_ms`, up to which marks belong to losses that are over.
"""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import cast

from pydantic import ConfigDict
from redis.asyncio import Redis

from azu.errors import Conflict
from azu.money.ledger.records import ENTRIES, JOURNAL

LOSS = "azu:ledger:loss"
_NOTE = """
if tonumber(ARGV[3]) <= tonumber(redis.call('HGET', KEYS[1], 'settled_at_ms') or '0') then return 0 end
local time = redis.call('TIME')
redis.call('HSETNX', KEYS[1], 'noticed_at_ms', time[1] .. string.format('%03d', math.floor(time[2] / 1000)))
for index, name in ipairs({'entries', 'payout_writes'}) do
  if tonumber(ARGV[index]) > tonumber(redis.call('HGET', KEYS[1], name) or '0') then
    redis.call('HSET', KEYS[1], name, ARGV[index])
  end
end
return 1
"""
_SETTLE = """
local noticed = redis.call('HGET', KEYS[1], 'noticed_at_ms')
if noticed then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'settled_at_ms', noticed)
end
return 1
"""
_LATEST = 2**53


@dataclass(frozen=True, slots=True)
class Mark:
    """An entry of the journal that a process was answered; without a transfer there was none yet."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    number: int = 0
    transfer_id: str = ""
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class Loss:
    """How far Redis went back: entries of the journal, and writes of payouts on their way."""

    entries: int
    payout_writes: int
    is_accepted: bool

    @property
    def size(self) -> int:
        """The number that the admin accepts."""
        return self.entries + self.payout_writes

    def __str__(self) -> str:
        return (
            f"the ledger went back by {self.size} ({self.entries} entries, {self.payout_writes} of payouts)"
        )


def entries_lost(mark: Mark, found_number: int, length: int) -> int:
    """Return how many entries up to the mark are gone, at least; 0 if the journal has the mark's entry.

    `found_number` is where the journal has the mark's transfer, 0 if nowhere; `length` is the journal's.
    """
    if not mark.transfer_id or found_number == mark.number:
        return 0
    return max(1, mark.number - length)


class Losses:
    """One process's mark, and the loss that stands in Redis. Methods raise Unavailable while Redis is away.

    `num_noted` counts the losses that this process has noted, `has_noted` is set while one of them is open.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._note = redis.register_script(_NOTE)
        self._settle = redis.register_script(_SETTLE)
        self.mark = Mark()
        self.num_noted = 0
        self.has_noted = False

    def answered(self, mark: Mark) -> None:
        """Remember an entry that Redis answered."""
        if mark.number > self.mark.number:
            self.mark = mark

    async def look(self) -> Loss | None:
        """Compare Redis with this process's mark; return the loss that is open now, None if there is none."""
        mark = self.mark
        async with self._redis.pipeline(transaction=True) as read:
            read.hget(ENTRIES, mark.transfer_id)
            read.xlen(JOURNAL)
            found, length = await read.execute()
        if lost := entries_lost(mark, int(found or 0), length):
            await self.note(mark, entries=lost)
        return await self.open_loss()

    async def note(self, mark: Mark, *, entries: int = 0, payout_writes: int = 0) -> None:
        """Write a loss; a mark from before a loss that is over changes nothing."""
        is_new = await self._note([LOSS], [entries, payout_writes, mark.at_ms or _LATEST])
        self.num_noted += 1
        self.has_noted = self.has_noted or bool(is_new)
        if self.mark == mark:
            self.mark = Mark()

    async def open_loss(self) -> Loss | None:
        """Return the loss that stands in Redis."""
        found = await cast(Awaitable[dict[str, str]], self._redis.hgetall(LOSS))
        if "noticed_at_ms" not in found:
            return None
        entries, payout_writes = int(found.get("entries", 0)), int(found.get("payout_writes", 0))
        return Loss(entries, payout_writes, found.get("accepted") == str(entries + payout_writes))

    async def accept(self, size: int) -> None:
        """Accept the open loss; raises Conflict if it has another size or there is none."""
        loss = await self.open_loss()
        if loss is None:
            raise Conflict("the ledger did not go back: there is nothing to accept")
        if loss.size != size:
            raise Conflict(f"{loss}: check that this is right, then accept {loss.size}")
        await self._redis.hset(LOSS, "accepted", str(size))

    async def settle(self) -> None:
        """Close an accepted loss."""
        await self._settle([LOSS])
        self.has_noted = False
