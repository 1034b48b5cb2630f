"""Follows the token streams of any number of jobs over one connection to Redis."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from redis.asyncio import Redis

from azu.errors import AzuError, Unavailable
from azu.jobs.record import OUTCOME, decode_event, job_key, token_count, tokens_key, wake_key, without_first
from azu.protocol.job import JobEvent, TokenEvent
from azu.redis_client import FIRST_PAUSE_S, retry_until_available
from azu.supervision import FAULTS_IN_A_ROW, as_known_error

# Shorter than the connection's own timeout: a quiet stream must not look like a lost connection.
BLOCK_MS = 2_000
# How long the reader of a stream waits for a Redis that is away, and for news of a job before it asks.
AWAY_S = 600.0
_QUIET_S = 5.0
_FAULT_PAUSE_S = 0.2
_ENTRIES_PER_STREAM = 256
_WAKE_KEPT_S = 600

JOB_LOST = "job_lost"

Entry = tuple[str, dict[str, str]]


class TokenReader:
    """Follows any number of jobs over one connection.

    The reading task runs while a job has a follower. A new follower wakes the blocked read through a stream
    of the reader's own, so that its first token arrives as soon as it is written.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._wake = wake_key(secrets.token_hex(8))
        self._followers: set[_Subscription] = set()
        self._task: asyncio.Task[None] | None = None
        self._woken = "0-0"

    async def follow(self, job_id: str, after: int) -> AsyncIterator[JobEvent]:
        """Yield a running job's events after completion token `after`, up to its outcome."""
        subscription = _Subscription(job_id, after)
        self._followers.add(subscription)
        try:
            # A reading task that finds Redis away begins again by itself, with this follower.
            with suppress(Unavailable):
                await self._wake_reading_task()
            while True:
                arrival = await subscription.arrivals.get()
                if isinstance(arrival, Exception):
                    raise arrival
                yield arrival
                if not isinstance(arrival, TokenEvent):
                    return
        finally:
            self._followers.discard(subscription)

    async def _wake_reading_task(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read(), name="token-reader")
            return
        async with self._redis.pipeline() as pipeline:
            pipeline.xadd(self._wake, {"wake": "1"}, maxlen=1, approximate=False)
            pipeline.expire(self._wake, _WAKE_KEPT_S)
            await pipeline.execute()

    async def standing(self, job_ids: Sequence[str]) -> list[tuple[str | None, str | None]]:
        """Return how many tokens of each job are written, None for an unknown job, and its outcome if any."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hmget(job_key(job_id), ["delivered", "outcome"])
            found = await pipeline.execute()
        return [(delivered, outcome) for delivered, outcome in found]

    async def _read(self) -> None:
        faults = 0
        while self._followers:
            try:
                await retry_until_available(self._read_once, within_s=AWAY_S, longest_pause_s=FIRST_PAUSE_S)
            except Exception as error:
                faults += 1
                known = as_known_error(error, "the reading of token streams")
                if known is error or faults == FAULTS_IN_A_ROW:
                    # Every follower must raise it; the next follower starts a new task.
                    for follower in self._followers:
                        follower.arrivals.put_nowait(known)
                    return
                await asyncio.sleep(_FAULT_PAUSE_S)
            else:
                faults = 0

    async def _read_once(self) -> None:
        # One that comes during the read may lack tokens before those that the read returns.
        followers = tuple(self._followers)
        streams = _positions(followers) | {self._wake: self._woken}
        answer = dict(await read_new(self._redis, streams, count=_ENTRIES_PER_STREAM))
        if wakes := answer.pop(self._wake, None):
            self._woken = wakes[-1][0]
        self._distribute(answer, followers)
        now_s = time.monotonic()
        quiet = [one for one in self._followers if not one.ended and now_s - one.heard_s >= _QUIET_S]
        if not quiet:
            return
        # A Redis that lost its last writes sends nothing of a job that it does not know any more, and nothing
        # before the place that a reader has reached.
        for one, (delivered, outcome) in zip(
            quiet, await self.standing([one.job_id for one in quiet]), strict=True
        ):
            try:
                one.compare(None if delivered is None else int(delivered), outcome)
            except Exception as error:
                one.fail(as_known_error(error, f"the reading of the end of {one.job_id}"))

    def _distribute(self, answer: Mapping[str, list[Entry]], followers: Sequence["_Subscription"]) -> None:
        events: dict[str, list[tuple[str, JobEvent]]] = {}
        for key, entries in answer.items():
            try:
                events[key] = [(entry_id, decode_event(entry_id, fields)) for entry_id, fields in entries]
            except Exception as error:
                # The other streams go on.
                known = as_known_error(error, f"the reading of {key}")
                for follower in followers:
                    if tokens_key(follower.job_id) == key:
                        follower.fail(known)
        for follower in followers:
            for entry_id, event in events.get(tokens_key(follower.job_id), ()):
                follower.receive(entry_id, event)


class _Subscription:
    """One follower of one job; `position` counts the completion tokens that it received."""

    def __init__(self, job_id: str, position: int) -> None:
        self.job_id = job_id
        self.position = position
        self.ended = False
        self.heard_s = time.monotonic()
        self.arrivals: asyncio.Queue[JobEvent | Exception] = asyncio.Queue()

    def fail(self, error: AzuError) -> None:
        """Have the follower raise an error."""
        self.ended = True
        self.arrivals.put_nowait(error)

    def receive(self, entry_id: str, event: JobEvent) -> None:
        """Queue an entry's event, without the tokens that the follower received before."""
        if self.ended:
            return
        self.heard_s = time.monotonic()
        if not isinstance(event, TokenEvent):
            self.ended = True
            self.arrivals.put_nowait(event)
        elif (end := token_count(entry_id)) > self.position:
            self.arrivals.put_nowait(without_first(event, self.position))
            self.position = end

    def compare(self, delivered: int | None, outcome: str | None) -> None:
        """Compare with the job's record; end a follower whose job is lost or has ended meanwhile."""
        self.heard_s = time.monotonic()
        if delivered is None:
            self.ended = True
            lost = f"Redis lost {self.job_id} when it lost its last writes; what it reserved is given back"
            self.arrivals.put_nowait(Unavailable(lost, code=JOB_LOST))
        elif outcome is not None and delivered <= self.position:
            self.ended = True
            self.arrivals.put_nowait(OUTCOME.validate_json(outcome))


def _positions(followers: Iterable[_Subscription]) -> dict[str, str]:
    """Return each followed stream and the last entry that all its followers have."""
    positions: dict[str, int] = {}
    for follower in followers:
        if not follower.ended:
            key = tokens_key(follower.job_id)
            positions[key] = min(positions.get(key, follower.position), follower.position)
    return {key: f"{position}-0" for key, position in positions.items()}


async def read_new(
    redis: Redis, positions: Mapping[str, str], *, count: int
) -> list[tuple[str, list[Entry]]]:
    """Return (stream, entries after its position), waiting up to BLOCK_MS for a first one."""
    streams: dict[Any, Any] = dict(positions)
    return cast(list[tuple[str, list[Entry]]], await redis.xread(streams, count=count, block=BLOCK_MS))
