"""Prompts and answers are removed when the policy says so, from Redis at once and soon from its file."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from azu.errors import Conflict, NotFound
from azu.jobs.departures import Departures, Reader, request_name
from azu.jobs.record import QUEUE, REMOVED
from azu.jobs.redis import RedisJobs
from azu.jobs.retention import REWRITE_AFTER_MS, REWRITING, UNREAD_MS
from azu.launch.processes import ProcessGroup
from azu.launch.redis_server import JOB_STORE, RedisServer, start_redis, wait_for_redis
from azu.protocol.job import JobState, TokenEvent
from azu.redis_client import connect_redis
from tests.builders import ALICE, job
from tests.jobs.endings import outcome, tokens

ASKED = request_name("key-1", b"content")
KEPT_MS = 60_000


async def ended(jobs: RedisJobs, departures: Departures | None = None, job_id: str = "job-1") -> int:
    """Submit a job, with a client that waits for it or without, and end it; return when it ended, in ms."""
    given = (ASKED, departures.ingress) if departures else ()
    await jobs.submit(job(job_id, prompt_token_ids=(123456, 123457)), *given)
    await jobs.append([(job_id, TokenEvent(0, (5, 6)))])
    await jobs.finish(job_id, outcome(job_id))
    return int(await jobs._redis.hget(f"azu:job:{job_id}", "ended_at_ms") or 0)


async def is_kept(jobs: RedisJobs, now_ms: int, kept_ms: int = 0, job_id: str = "job-1") -> bool:
    """Archive what is due at a time; say if the job still has its prompt and its answer."""
    await jobs.archive(now_ms, kept_ms)
    record = await jobs.get(job_id)
    assert record is not None
    assert record.outcome == outcome(job_id), "the receipt stays"
    has_prompt, has_answer = bool(record.job.prompt_token_ids), bool(await tokens(jobs, job_id))
    assert has_prompt == has_answer
    return has_prompt


def test_a_job_loses_its_texts_so_long_after_its_end_read_or_not(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        ended_ms = await ended(jobs)
        assert await is_kept(jobs, ended_ms + KEPT_MS - 1, KEPT_MS)
        assert not await is_kept(jobs, ended_ms + KEPT_MS, KEPT_MS)

    run_scenario(scenario)


def test_without_retention_an_answer_goes_when_its_client_has_read_it(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=600)
        await departures.beat()
        soon_ms = await ended(jobs, departures) + 10_000
        for waits in range(2):
            assert await is_kept(jobs, soon_ms + waits * 60_000), "its client may be slow"

        await departures.answered(Reader("job-1", ALICE, ASKED))

        assert not await is_kept(jobs, soon_ms + 180_000)

    run_scenario(scenario)


def test_without_retention_a_client_that_hung_up_has_its_time_to_come_back(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=600)
        await departures.beat()
        ended_ms = await ended(jobs, departures)
        await departures.leave(Reader("job-1", ALICE, ASKED))
        assert await is_kept(jobs, ended_ms + 590_000)
        back = await departures.find(ALICE, ASKED)
        assert back is not None, "the answer is there for it"
        assert await is_kept(jobs, ended_ms + 700_000), "it reads"
        await departures.leave(back)
        assert await is_kept(jobs, ended_ms + 590_000)

        assert not await is_kept(jobs, ended_ms + 800_000)

        assert await departures.find(ALICE, ASKED) is None

    run_scenario(scenario)


def test_without_retention_the_client_of_an_ingress_that_died_has_the_same_time(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        departures = Departures(jobs._redis, kept_s=600)
        await departures.beat()
        ended_ms = await ended(jobs, departures)
        assert await is_kept(jobs, ended_ms + 10_000)
        await jobs._redis.delete(f"azu:jobs:ingress:{departures.ingress}")  # as it expires by itself

        assert not await is_kept(jobs, ended_ms + 80_000)

    run_scenario(scenario)


@pytest.mark.parametrize("is_read", [True, False])
def test_without_retention_a_submitted_answer_is_kept_until_it_is_read_or_for_a_day(
    run_scenario, is_read: bool
) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.note_read("job-1")
        ended_ms = await ended(jobs)
        assert await is_kept(jobs, ended_ms + 10_000)
        if is_read:
            await jobs.note_read("job-1")

        assert await is_kept(jobs, ended_ms + UNREAD_MS - 1) is (not is_read)
        assert not await is_kept(jobs, ended_ms + UNREAD_MS + 60_000)
        await jobs.note_read("job-1")
        assert not await jobs._redis.exists("azu:job:job-1"), "nothing of it comes back"

    run_scenario(scenario)


def test_a_job_that_has_not_ended_is_not_removed_and_one_that_has_is_at_once(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        with pytest.raises(Conflict):
            await jobs.remove("job-1", 1)
        assert (await jobs.get("job-1")).job == job()
        await jobs.finish("job-1", outcome())

        for _ in range(2):
            await jobs.remove("job-1", 1)

        record = await jobs.get("job-1")
        assert record is not None
        assert (record.job.prompt_token_ids, record.outcome) == ((), outcome())
        assert await jobs.states(["job-1"]) == [JobState.DONE], "it is not in flight"
        assert not await jobs._redis.xlen(QUEUE), "no scheduler takes it again"
        assert not await jobs.finish("job-1", outcome()), "the end may be written again"

    run_scenario(scenario)


def test_an_answer_that_is_removed_while_it_is_read_does_not_end_as_if_it_were_whole(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await jobs.submit(job())
        for index in range(300):
            await jobs.append([("job-1", TokenEvent(index, (5,)))])
        await jobs.finish("job-1", outcome())
        reading = jobs.events("job-1")
        await anext(reading)

        await jobs.remove("job-1", 1)

        with pytest.raises(NotFound, match="not kept"):
            async for _ in reading:
                pass

    run_scenario(scenario)


@dataclass(frozen=True)
class TheStore:
    """The store of jobs that `azu up` starts."""

    group: ProcessGroup
    server: RedisServer
    folder: Path

    def die(self) -> None:
        """Kill it, and start it again as `azu up` does."""
        os.kill(self.group.pid(JOB_STORE.name), signal.SIGKILL)
        while not self.group.revive():
            pass
        wait_for_redis(self.group, self.server, 15.0)


def in_the_store(tmp_path: Path, scenario: Callable[[RedisJobs, TheStore], Awaitable[None]]) -> None:
    """Run a scenario as the scheduler, in the store that `azu up` starts."""

    async def run(store: TheStore) -> None:
        redis = connect_redis(store.server.url("scheduler"))
        try:
            await asyncio.wait_for(scenario(RedisJobs(redis), store), 60)
        finally:
            await redis.aclose()

    folder = tmp_path / JOB_STORE.name
    with ProcessGroup(tmp_path / "logs") as group:
        store = TheStore(group, start_redis(group, JOB_STORE, folder), folder)
        wait_for_redis(group, store.server, 15.0)
        asyncio.run(run(store))


def holds(folder: Path, text: bytes) -> bool:
    """Say if any file of the store has a text."""
    return any(text in file.read_bytes() for file in folder.rglob("*") if file.is_file())


async def is_rewritten(jobs: RedisJobs, now_ms: int) -> None:
    """Look as often as the scheduler would, until nothing is left to remove from the file."""
    while await jobs._redis.exists(REMOVED, REWRITING):
        await jobs.archive(now_ms, 0)
        await asyncio.sleep(0.05)


def test_the_file_of_the_store_loses_what_was_removed(tmp_path: Path) -> None:
    async def scenario(jobs: RedisJobs, store: TheStore) -> None:
        ended_ms = await ended(jobs)
        await jobs.remove("job-1", ended_ms)
        await asyncio.sleep(1.5)  # the file is flushed once a second
        await jobs.archive(ended_ms + REWRITE_AFTER_MS - 1, 0)
        assert holds(store.folder, b"123456"), "else this test shows nothing"
        assert await jobs._redis.get(REMOVED) == str(ended_ms)

        await is_rewritten(jobs, ended_ms + REWRITE_AFTER_MS)

        assert not holds(store.folder, b"123456")
        assert holds(store.folder, b"azu:jobs:archive")

    in_the_store(tmp_path, scenario)


def test_a_store_that_dies_while_it_writes_its_file_anew_still_loses_what_was_removed(tmp_path: Path) -> None:
    async def scenario(jobs: RedisJobs, store: TheStore) -> None:
        ended_ms = await ended(jobs)
        await jobs.remove("job-1", ended_ms)
        await asyncio.sleep(1.5)  # the file is flushed once a second
        owner = connect_redis(store.server.owner)
        await owner.config_set("rdb-key-save-delay", 10_000_000)
        while not (await owner.info("persistence"))["aof_rewrite_in_progress"]:
            await jobs.archive(ended_ms + REWRITE_AFTER_MS, 0)
        while not list(store.folder.glob("temp-*")):
            await asyncio.sleep(0.01)
        await owner.aclose()

        await asyncio.to_thread(store.die)

        assert not list(store.folder.glob("temp-*")), "half a file, which nothing would read or delete"
        assert holds(store.folder, b"123456"), "else this test shows nothing"
        await is_rewritten(jobs, ended_ms + REWRITE_AFTER_MS)
        assert not holds(store.folder, b"123456")

    in_the_store(tmp_path, scenario)


def test_a_redis_that_refuses_to_write_its_file_anew_is_said_once_and_stops_nothing(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        owner = connect_redis(redis_url)
        await owner.execute_command("ACL", "SETUSER", "meek", "on", "nopass", "~*", "+@all", "-bgrewriteaof")
        meek = connect_redis(redis_url.replace("redis://", "redis://meek:x@"))
        try:
            await owner.config_set("appendonly", "yes")
            jobs = RedisJobs(meek)
            ended_ms = await ended(jobs)
            await jobs.remove("job-1", ended_ms)
            while await meek.exists(REMOVED, REWRITING):
                await jobs.archive(ended_ms + REWRITE_AFTER_MS, 0)
                await asyncio.sleep(0.05)
            await jobs.archive(ended_ms + 9 * REWRITE_AFTER_MS, 0)
        finally:
            await owner.config_set("appendonly", "no")
            await owner.execute_command("ACL", "DELUSER", "meek")
            await meek.aclose()
            await owner.aclose()

    asyncio.run(scenario())

    assert caplog.text.count("refuses to write its file anew") == 1
