"""How long an ended job keeps its prompt and its answer, and when they leave the file of the job store.

`azu:jobs:ended`      sorted set: ended jobs that are not archived, by the time of their end in ms; one that
                      may still be read is looked at again later.
`azu:jobs:removed`    when something was first removed that the file may still hold, in ms.
`azu:jobs:rewriting`  the same, for what the file loses when it has been written anew.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from azu.errors import Conflict
from azu.jobs.archive import Archive
from azu.jobs.departures import may_be_read
from azu.jobs.record import ENDED, REMOVED, job_key

log = logging.getLogger(__name__)

REWRITING = "azu:jobs:rewriting"
# A removed prompt leaves the file within an hour: writing the file anew takes minutes.
REWRITE_AFTER_MS = 30 * 60 * 1000
# Where answers are removed as soon as they are read: how long one is kept that no connection waits for.
UNREAD_MS = 24 * 3600 * 1000
# The scheduler may still be about to take a job that has just ended out of the queue.
_SETTLED_MS = 10_000
_LOOK_AGAIN_MS = 60_000
_AT_ONCE = 200


class Retention:
    """Removes prompts and answers. Each method raises Unavailable while Redis is away; it may be repeated."""

    def __init__(self, redis: Redis, archive: Archive) -> None:
        self._redis = redis
        self._archive = archive
        self._asked: str | None = None  # the run of Redis that was asked to write its file anew

    async def sweep(self, now_ms: int, kept_ms: int) -> bool:
        """Archive jobs that ended `kept_ms` ago, unless they may still be read; say if there may be more.

        With 0 a job is archived as soon as its client has the whole answer, or may not come back any more.
        """
        until_ms = now_ms - max(kept_ms, _SETTLED_MS)
        found = await self._redis.zrangebyscore(ENDED, "-inf", until_ms, start=0, num=_AT_ONCE)
        job_ids = cast(list[str], found)
        if not job_ids:
            return False
        records = await self._fields(job_ids)
        read = {
            job_id: fields
            for job_id, fields in records.items()
            if not await self._may_be_read(job_id, fields, now_ms, kept_ms)
        }
        await self._archive.put(read, now_ms)
        if waiting := dict.fromkeys(records.keys() - read.keys(), until_ms + _LOOK_AGAIN_MS):
            await self._redis.zadd(ENDED, waiting, xx=True)
        return len(job_ids) == _AT_ONCE

    async def remove(self, job_id: str, now_ms: int) -> None:
        """Archive one job at once, unless it is archived. Raises Conflict for one that has not ended."""
        records = await self._fields([job_id])
        fields = records[job_id]
        if "job" in fields and "outcome" not in fields:
            raise Conflict(f"{job_id} has not ended; cancel it first", code="job_not_finished")
        await self._archive.put(records, now_ms)

    async def rewrite(self, now_ms: int) -> None:
        """Have Redis write its file anew some time after a removal; to be called again and again."""
        if not await self._redis.exists(REWRITING):
            removed_ms = cast(str | None, await self._redis.get(REMOVED))
            if removed_ms is None or now_ms - int(removed_ms) < REWRITE_AFTER_MS:
                return
            await self._redis.rename(REMOVED, REWRITING)
        try:
            state = cast(Mapping[str, Any], await self._redis.info())
            if state.get("aof_rewrite_in_progress") or state.get("aof_rewrite_scheduled"):
                return  # it may have begun before the removal
            # A Redis that was started again has forgotten that it was asked, and says "ok".
            run = str(state.get("run_id"))
            has_asked = self._asked == run
            is_written = has_asked and state.get("aof_last_bgrewrite_status") == "ok"
            if is_written or not state.get("aof_enabled"):
                await self._redis.delete(REWRITING)
                self._asked = None
                return
            if has_asked:
                log.error("Redis could not write its file anew: removed prompts are still in it")
            await self._redis.bgrewriteaof()
            self._asked = run
        except ResponseError as refused:
            if "already in progress" in str(refused):
                return
            log.error("Redis refuses to write its file anew, removed prompts may stay in it: %s", refused)
            await self._redis.delete(REWRITING)

    async def _fields(self, job_ids: list[str]) -> dict[str, dict[str, str]]:
        async with self._redis.pipeline(transaction=False) as read:
            for job_id in job_ids:
                read.hgetall(job_key(job_id))
            return dict(zip(job_ids, await read.execute(), strict=True))

    async def _may_be_read(self, job_id: str, fields: Mapping[str, str], now_ms: int, kept_ms: int) -> bool:
        """Say whether an ended job's answer was not read whole and may still be."""
        asked = fields.get("asked")
        if not asked:
            is_new = int(fields.get("ended_at_ms", 0)) + UNREAD_MS > now_ms
            return not kept_ms and is_new and "outcome" in fields and "read" not in fields
        return await may_be_read(self._redis, job_id, asked, now_ms)
