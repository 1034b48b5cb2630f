"""One blocked read for all token streams that a process follows."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping

from redis.asyncio import Redis

from azu.jobs.keys import tokens_key, wake_key
from azu.jobs.record import end_of, event_from_entry, without_first
from azu.jobs.streams import Entry, read_new
from azu.protocol.job import JobEvent, TokenEvent

_ENTRIES_PER_STREAM = 256
_WAKE_KEPT_S = 600

_Arrival = JobEvent | Exception


class _Subscription:
    """One follower of one job; `position` counts the completion tokens it was given."""

    def __init__(self, job_id: str, position: int) -> None:
        self.job_id = job_id
        self.position = position
        self.ended = False
        self.arrivals: asyncio.Queue[_Arrival] = asyncio.Queue()

    def give(self, entry_id: str, event: JobEvent) -> None:
        """Hand over an entry, without what this follower has."""
        if self.ended:
            return
        if not isinstance(event, TokenEvent):
            self.ended = True
            self.arrivals.put_nowait(event)
        elif (end := end_of(entry_id)) > self.position:
            self.arrivals.put_nowait(without_first(event, self.position))
            self.position = end


class TokenReader:
    """Follows any number of jobs over one connection.

    The reading task lives while somebody follows a job. A new follower wakes the blocked read through a
    stream of the reader's own, so that its first token comes as soon as it exists.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._wake = wake_key(secrets.token_hex(8))
        self._followers: set[_Subscription] = set()
        self._task: asyncio.Task[None] | None = None

    async def follow(self, job_id: str, after: int) -> AsyncIterator[JobEvent]:
        """Yield a running job's events behind completion token `after`, up to its outcome."""
        subscription = _Subscription(job_id, after)
        self._followers.add(subscription)
        try:
            await self._look_again()
            while True:
                arrival = await subscription.arrivals.get()
                if isinstance(arrival, Exception):
                    raise arrival
                yield arrival
                if not isinstance(arrival, TokenEvent):
                    return
        finally:
            self._followers.discard(subscription)

    async def _look_again(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read(), name="token-reader")
            return
        async with self._redis.pipeline() as pipeline:
            pipeline.xadd(self._wake, {"look": "again"}, maxlen=1, approximate=False)
            pipeline.expire(self._wake, _WAKE_KEPT_S)
            await pipeline.execute()

    async def _read(self) -> None:
        try:
            woken = "0-0"
            while self._followers:
                streams = self._positions() | {self._wake: woken}
                answer = dict(await read_new(self._redis, streams, count=_ENTRIES_PER_STREAM))
                if wakes := answer.pop(self._wake, None):
                    woken = wakes[-1][0]
                self._hand_out(answer)
        except Exception as error:
            # Whoever follows has to hear of it; the next follower starts a new task.
            for follower in self._followers:
                follower.arrivals.put_nowait(error)

    def _positions(self) -> dict[str, str]:
        """Return each followed stream and the entry from which somebody needs it."""
        positions: dict[str, int] = {}
        for follower in self._followers:
            if not follower.ended:
                key = tokens_key(follower.job_id)
                positions[key] = min(positions.get(key, follower.position), follower.position)
        return {key: f"{position}-0" for key, position in positions.items()}

    def _hand_out(self, answer: Mapping[str, list[Entry]]) -> None:
        events = {
            key: [(entry_id, event_from_entry(entry_id, fields)) for entry_id, fields in entries]
            for key, entries in answer.items()
        }
        for follower in self._followers:
            for entry_id, event in events.get(tokens_key(follower.job_id), ()):
                follower.give(entry_id, event)
