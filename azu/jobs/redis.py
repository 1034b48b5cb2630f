"""Jobs in Redis: the records, the queue, and one token stream per job.

Keys and encodings: azu/jobs/record.py. A change of several keys is one of the Lua scripts beside this file.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, cast

from redis.asyncio import Redis

from azu.errors import AzuError, InvalidRequest, NotFound, Unavailable
from azu.jobs.archive import Archive
from azu.jobs.earned import EARNED, KEPT_DAYS, shares_of
from azu.jobs.record import (
    CANCELLATIONS_KEPT,
    CANCELLED,
    ENDED,
    GROUP,
    JOB,
    LOOKED,
    MOST_FAULTS,
    OUTCOME,
    PHASE,
    QUEUE,
    WORK,
    JobProgress,
    JobRecord,
    address_key,
    asked_key,
    decode_event,
    encode_numbers,
    encode_top_logprobs,
    job_key,
    lost_key,
    phase_now,
    read_record,
    token_count,
    tokens_key,
    without_first,
)
from azu.jobs.retention import Retention
from azu.jobs.token_reader import AWAY_S, BLOCK_MS, JOB_LOST, Entry, TokenReader, read_new
from azu.protocol.job import Job, JobEvent, JobOutcome, JobState, TokenEvent
from azu.protocol.phase import JobPhase
from azu.redis_client import connect_redis, retry_until_available

TOKENS_KEPT_S = 24 * 3600
# What an address's list of jobs keeps; every receipt is kept.
LISTED_JOBS = 100_000
_LISTED_MS = 90 * 24 * 3600 * 1000
# Longer than any process hangs between the reservation of a job and its submission.
_LOST_KEPT_S = 7 * 24 * 3600
_CLIENT_LEFT, _REFUSED = "client left", "refused"
_TAKEN_AT_ONCE = 64
_OWN_IDLE_MS = 2_000
_EVENTS_AT_ONCE = 1024
# A stream may have a million entries; what else the process does goes on between two reads.
_ENTRIES_AT_ONCE = 256

Ended = Callable[[str], Awaitable[JobOutcome | None]]


class RedisJobs:
    """Durable jobs. A caller that got no answer may call any method again: nothing happens twice.

    `ended` says how the books have ended a job: with it, a job that Redis lost still has its end.
    """

    def __init__(self, redis: Redis, ended: Ended | None = None) -> None:
        self._ended = ended or _unended
        self._redis = redis
        self._reader = TokenReader(redis)
        self._archive = Archive(redis)
        self._retention = Retention(redis, self._archive)
        self._submit = redis.register_script(_script("submit"))
        self._claim = redis.register_script(_script("claim"))
        self._set_state = redis.register_script(_script("set_state"))
        self._append = redis.register_script(_script("append"))
        self._finish = redis.register_script(_script("finish"))
        self._explain = redis.register_script(_script("explain"))
        self._done = redis.register_script(_script("done"))
        self._cancel = redis.register_script(_script("cancel"))
        self._left_for = redis.register_script(_script("left_for"))
        self._give_up = redis.register_script(_script("give_up"))
        self._read = redis.register_script(_script("read"))

    @classmethod
    def from_url(cls, url: str) -> "RedisJobs":
        """Return the jobs kept in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    # Intake and look-ups

    async def submit(
        self, job: Job, asked: str = "", ingress: str = "", tools: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Write a job and queue it; a known job id changes nothing.

        `asked` names the request whose connection to `ingress` waits for the job, and `tools` are those that
        its prompt offers: who reads the answer again parses their calls. Raises Unavailable for a
        job that was marked as lost before it came.
        """
        keys = [job_key(job.job_id), QUEUE, address_key(job.address), lost_key(job.job_id), asked_key(asked)]
        arguments: list[str | bytes | int] = [job.job_id, JOB.dump_json(job), job.created_at_ms]
        arguments += [LISTED_JOBS, _LISTED_MS, asked, ingress, TOKENS_KEPT_S]
        arguments.append(json.dumps(list(tools)) if tools else "")
        if await self._submit(keys, arguments) < 0:
            raise Unavailable(f"it took too long to write {job.job_id}; send it again")

    async def give_up(self, job_id: str) -> bool:
        """Mark a job that was never written as lost: it cannot be written later. False if it is written."""
        return bool(await self._give_up([job_key(job_id), lost_key(job_id)], [_LOST_KEPT_S]))

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job's record, or None for an id that was never submitted."""
        (found,) = await self._records([job_id])
        if isinstance(found, AzuError):
            raise found
        return found

    async def delivered(self, job_id: str) -> int:
        """Return how many tokens are in a job's stream; raises NotFound for an unknown job."""
        ((delivered, _),) = await self._reader.standing([job_id])
        if delivered is None:
            raise _unknown(job_id)
        return int(delivered)

    async def states(self, job_ids: Sequence[str]) -> list[JobState | None]:
        """Return the jobs' states; None for an id that was never submitted."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hget(job_key(job_id), "state")
            found = await pipeline.execute()
        unknown = [job_id for job_id, state in zip(job_ids, found, strict=True) if state is None]
        archived = {job_id: one.state for job_id, one in (await self._archive.read(unknown)).items()}
        return [
            archived.get(job_id) if state is None else JobState(state)
            for job_id, state in zip(job_ids, found, strict=True)
        ]

    async def of(self, address: str, limit: int, before: str = "") -> list[JobRecord]:
        """Return the latest jobs of an address, or the latest `before` a job, newest first."""
        first, key = 0, address_key(address)
        if before:
            place = await self._redis.zrevrank(key, before)
            if place is None:  # too old to be listed, and so is what came before it
                return []
            first = cast(int, place) + 1
        job_ids = cast(list[str], await self._redis.zrevrange(key, first, first + limit - 1))
        return [one for one in await self._records(job_ids) if isinstance(one, JobRecord)]

    # The queue

    async def take(
        self, consumer: str, block_ms: int, claim_idle_ms: int, known: Container[str] = ()
    ) -> list[JobRecord]:
        """Return jobs that belong to `consumer` from now on, waiting up to `block_ms` for a new one.

        A job that is taken and not done is returned again: to another consumer when its holder has not called
        this for `claim_idle_ms`, to its holder after two seconds unless it is `known` to run there. The call
        itself renews the hold.
        """
        arguments: list[str | int] = [GROUP, consumer, claim_idle_ms, _OWN_IDLE_MS, _TAKEN_AT_ONCE]
        claimed: list[str] = await self._claim([QUEUE], arguments)
        job_ids = [job_id for job_id in claimed if job_id not in known]
        if not claimed:
            entries = await _read_group(
                self._redis, GROUP, consumer, QUEUE, count=_TAKEN_AT_ONCE, block_ms=block_ms
            )
            job_ids = [fields["job"] for _, fields in entries]
        return await self._taken(job_ids)

    async def take_over(self, consumer: str) -> list[JobRecord]:
        """Return every job that is taken and not done; all of them belong to `consumer` from now on.

        Only for a caller that knows that no other consumer is left.
        """
        await self._claim([QUEUE], [GROUP, consumer, 0, 0, 1])  # makes the group
        job_ids: list[str] = []
        cursor = "0-0"
        while True:
            answer: Any = await self._redis.xautoclaim(
                QUEUE, GROUP, consumer, min_idle_time=0, start_id=cursor, count=_TAKEN_AT_ONCE
            )
            # Redis 6.2 answers nil for an entry that was deleted.
            cursor, entries = answer[0], [entry for entry in answer[1] if entry and entry[1]]
            job_ids += [fields["job"] for _, fields in entries]
            if cursor == "0-0":
                return await self._taken(job_ids)

    async def _taken(self, job_ids: Sequence[str]) -> list[JobRecord]:
        """Return the jobs that can be read. One that cannot is removed at the third time: it is lost."""
        found = dict(zip(job_ids, await self._records(job_ids), strict=True))
        for job_id, record in found.items():
            if isinstance(record, AzuError) and await self.count_fault(job_id) >= MOST_FAULTS:
                async with self._redis.pipeline(transaction=True) as write:
                    await self._done([job_key(job_id), QUEUE], [GROUP], client=write)
                    write.delete(job_key(job_id), tokens_key(job_id))
                    await write.execute()
        return [record for record in found.values() if isinstance(record, JobRecord)]

    async def progress(self, job: Job) -> JobProgress:
        """Return the written part of a job, from which another pipeline resumes it. Raises NotFound."""
        found = await self._redis.hmget(job_key(job.job_id), ["state", "cancelled", "left"])
        state, cancelled, left = cast(list[str | None], found)
        if state is None:
            raise _unknown(job.job_id)
        events = [decode_event(*entry) async for entry in _read_all(self._redis, tokens_key(job.job_id))]
        written = [event for event in events if isinstance(event, TokenEvent)]
        return JobProgress.from_events(written, job.choices, cancelled=(cancelled or left) is not None)

    async def set_state(self, job_id: str, state: JobState) -> bool:
        """Record that a job is QUEUED or RUNNING; return True if it is cancelled, for good or for a while.

        The state of an ended job does not change. Raises NotFound.
        """
        assert state in (JobState.QUEUED, JobState.RUNNING), "finish() ends a job"
        cancelled = await self._set_state([job_key(job_id)], [state.value])
        if cancelled < 0:
            raise _unknown(job_id)
        return bool(cancelled)

    async def explain(self, phases: Mapping[str, JobPhase | None]) -> None:
        """Record where jobs stand; None says that a job has tokens and gets more.

        Raises Unavailable also without a phase, while Redis takes no writes.
        """
        keys = [LOOKED, *map(job_key, phases)]
        await self._explain(keys, [b"" if one is None else PHASE.dump_json(one) for one in phases.values()])

    async def phase(self, job: Job) -> JobPhase | None:
        """Return where a job stands, None for one that has ended or is unknown."""
        fields = ["state", "phase", "delivered"]
        state, told, delivered = cast(list[str | None], await self._redis.hmget(job_key(job.job_id), fields))
        return None if state is None else phase_now(job, JobState(state), told, int(delivered or 0))

    async def count_fault(self, job_id: str) -> int:
        """Count a fault on the way to a job's end; return how many there were, 0 for an unknown job."""
        if not await self._redis.hexists(job_key(job_id), "job"):
            return 0  # a record of nothing else would stay for ever
        return int(await self._redis.hincrby(job_key(job_id), "faults", 1))

    async def done(self, job_id: str) -> None:
        """Take a job out of the queue: no consumer takes it again."""
        await self._done([job_key(job_id), QUEUE], [GROUP])

    # Cancellations

    async def cancel(self, job_id: str, *, client_left: bool = False) -> None:
        """Record that a job is to end: its client left, or azu refuses it; an ended one does not change.

        The first reason stays.
        """
        reason = _CLIENT_LEFT if client_left else _REFUSED
        await self._cancel([job_key(job_id), CANCELLED], [job_id, reason, CANCELLATIONS_KEPT])

    async def left_for(self, job_id: str) -> float:
        """Return for how many seconds a cancelled job waits for its client, less than zero if that came back.

        With 0 the job is cancelled for good.
        """
        return int(await self._left_for([job_key(job_id)])) / 1000

    async def client_left(self, job_id: str) -> bool:
        """Return whether a job was cancelled because its client left."""
        cancelled = cast(Awaitable[str | None], self._redis.hget(job_key(job_id), "cancelled"))
        return await cancelled == _CLIENT_LEFT

    async def cancellations(self) -> AsyncIterator[tuple[str, bool]]:
        """Yield the ids of cancelled jobs, for ever, and those whose clients came back, with True.

        The latest past ones come first, so that a consumer misses none between `take` and this call; it
        ignores the ids of jobs that it does not run.
        """
        position = "0-0"
        while True:
            for _, entries in await read_new(self._redis, {CANCELLED: position}, count=CANCELLATIONS_KEPT):
                position = entries[-1][0]
                for _, fields in entries:
                    yield fields["job"], "back" in fields

    # What is kept

    async def archive(self, now_ms: int, kept_ms: int) -> None:
        """Archive every job that ended `kept_ms` ago and whose client is not expected any more.

        An archived job has neither prompt nor answer, and its state and receipt stay. With 0 an answer goes
        as soon as it was read whole.
        """
        while await self._retention.sweep(now_ms, kept_ms):
            pass
        await self._retention.rewrite(now_ms)

    async def note_read(self, job_id: str) -> None:
        """Note that the whole answer of a job was read; no connection waits for the job."""
        await self._read([job_key(job_id)])

    async def remove(self, job_id: str, now_ms: int) -> None:
        """Archive one ended job at once. Raises Conflict for one that has not ended."""
        await self._retention.remove(job_id, now_ms)

    # Tokens and the end

    async def append(self, events: Sequence[tuple[str, TokenEvent]]) -> frozenset[str]:
        """Write the new tokens of many jobs; return the ids of jobs that lack the tokens before these.

        Tokens that are already written do not change, and an ended job takes no more. Where Redis lost what
        it had written, an event would leave a gap or its job is unknown: such an event is not written.
        """
        refused: set[str] = set()
        for first in range(0, len(events), _EVENTS_AT_ONCE):
            refused |= await self._append_batch(events[first : first + _EVENTS_AT_ONCE])
        return frozenset(refused)

    async def _append_batch(self, events: Sequence[tuple[str, TokenEvent]]) -> set[str]:
        keys: list[str] = []
        arguments: list[int | str | bytes] = []
        for job_id, event in events:
            count = len(event.token_ids)
            assert {len(event.logprobs), len(event.top_logprobs)} <= {0, count}, "one per token, or none"
            keys += [job_key(job_id), tokens_key(job_id)]
            arguments += [event.index, count, encode_numbers(event.token_ids), encode_numbers(event.logprobs)]
            arguments += [encode_top_logprobs(event.top_logprobs), event.choice, event.finish_reason or ""]
            arguments += [WORK.dump_json(event.work) if event.work else ""]
        refused: list[int] = await self._append(keys, arguments)
        return {events[at - 1][0] for at in refused}

    async def finish(self, job_id: str, outcome: JobOutcome) -> bool:
        """Write a job's outcome and close its stream; False if there was an outcome, which stays.

        Raises NotFound.
        """
        keys = [job_key(job_id), tokens_key(job_id), ENDED, EARNED]
        tokens = outcome.receipt.completion_tokens
        arguments = [job_id, outcome.state.value, OUTCOME.dump_json(outcome), tokens, TOKENS_KEPT_S]
        arguments += [KEPT_DAYS, *shares_of(outcome.receipt)]
        written = await self._finish(keys, arguments)
        if written < 0 and not await self._archive.read([job_id]):
            raise _unknown(job_id)
        return int(written) > 0

    async def tokens(self, job_id: str, choices: int = 1) -> tuple[tuple[int, ...], ...]:
        """Return the tokens so far of each of a job's choices; none once its stream has expired."""
        found: list[list[int]] = [[] for _ in range(choices)]
        async for _, fields in _read_all(self._redis, tokens_key(job_id)):
            if "choice" in fields:
                found[int(fields["choice"])] += map(int, fields["tokens"].split())
        return tuple(map(tuple, found))

    async def events(self, job_id: str, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yield a job's events from completion token `after` on; the last one is its outcome.

        Waits for a Redis that is away, up to AWAY_S. Raises NotFound, InvalidRequest when the job has fewer
        tokens than `after`, and Unavailable.
        """
        found = await retry_until_available(partial(self._reader.standing, [job_id]), within_s=AWAY_S)
        delivered, outcome = found[0]
        if delivered is None:
            if archived := (await self._archive.read([job_id])).get(job_id):
                assert archived.outcome is not None
                yield archived.outcome
                return
            if (lost := await self._ended(job_id)) is None:
                raise _unknown(job_id)
            yield lost
            return
        if not 0 <= after <= int(delivered):
            raise InvalidRequest(f"after is {after}; the job has {delivered} tokens so far", param="after")
        if outcome is None:
            try:
                async for event in self._reader.follow(job_id, after):
                    yield event
            except Unavailable as error:
                if error.code != JOB_LOST or (lost := await self._ended(job_id)) is None:
                    raise
                yield lost
            return
        position = after
        async for entry_id, fields in _read_all(self._redis, tokens_key(job_id), after=f"{after}-0"):
            event = decode_event(entry_id, fields)
            if isinstance(event, TokenEvent):
                position = token_count(entry_id)
                yield without_first(event, after)
        if after < position < int(delivered):  # it was removed meanwhile
            raise NotFound(f"the answer of {job_id} is not kept any more", code="answer_removed")
        yield OUTCOME.validate_json(outcome)

    async def _records(self, job_ids: Sequence[str]) -> list[JobRecord | AzuError | None]:
        """Return each job's record, None for an unknown one, an error for one that cannot be read."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hgetall(job_key(job_id))
            found = await pipeline.execute()
        # A count may have been written to a record that Redis had lost.
        unknown = [job_id for job_id, fields in zip(job_ids, found, strict=True) if "job" not in fields]
        archived = await self._archive.read(unknown)
        return [
            read_record(job_id, fields) if "job" in fields else archived.get(job_id)
            for job_id, fields in zip(job_ids, found, strict=True)
        ]


async def _read_group(
    redis: Redis, group: str, consumer: str, stream: str, *, count: int, block_ms: int
) -> list[Entry]:
    """Return entries that no consumer of the group was given, waiting up to `block_ms` for a first one."""
    wait_ms = min(max(block_ms, 1), BLOCK_MS)  # Redis waits for ever at 0
    answer: Any = await redis.xreadgroup(group, consumer, {stream: ">"}, count, wait_ms)
    return [entry for _, entries in answer for entry in entries]


async def _read_all(redis: Redis, stream: str, *, after: str = "0-0") -> AsyncIterator[Entry]:
    """Yield a stream's entries after the entry `after`."""
    while True:
        found = await redis.xrange(stream, min=f"({after}", count=_ENTRIES_AT_ONCE)
        page = cast(list[Entry], found)
        for entry in page:
            yield entry
        if len(page) < _ENTRIES_AT_ONCE:
            return
        after = page[-1][0]


async def _unended(_: str) -> None:
    return None


def _unknown(job_id: str) -> NotFound:
    return NotFound(f"there is no job {job_id}", param="job_id", code="job_not_found")


def _script(name: str) -> str:
    return files("azu.jobs").joinpath(f"{name}.lua").read_text()
