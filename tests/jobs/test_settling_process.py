"""The settling process is killed at every write: no lamport is lost, paid twice or stuck."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import replace

import pytest
import redis

from azu.jobs.departures import Departures
from azu.jobs.draining import Draining
from azu.jobs.in_flight_limit import InFlightLimit
from azu.jobs.intake import Intake, JobLimits
from azu.jobs.redis import RedisJobs
from azu.money.books import Books, UserBalance
from azu.protocol.job import Job
from azu.protocol.sampling import SamplingParams
from azu.redis_client import connect_redis
from tests.builders import OWNERS
from tests.jobs.settling import start_settling
from tests.jobs.test_settlement import MODEL
from tests.killing import Death
from tests.money.accounts import BEARER, USER, fund, signed_key
from tests.money.serving import TERMS, ServedBooks, served
from tests.money.treasury.world import SEED

DEPOSITED = 100_000
LOST = "job-lost"
MOST_EFFECTS = 200
TIMEOUT_S = 30.0


async def submitted(redis_url: str, served: ServedBooks, dice: random.Random, count: int) -> list[Job]:
    """Deposit, submit jobs (sometimes cancel the first), and reserve for a job that is never written."""
    books, connections = served.client(), connect_redis(redis_url)
    jobs = RedisJobs(connections)
    try:
        return await submit(books, jobs, InFlightLimit(connections, jobs, 10_000), dice, count)
    finally:
        await books.close()
        await connections.aclose()


async def submit(
    books: Books, jobs: RedisJobs, in_flight_limit: InFlightLimit, dice: random.Random, count: int
) -> list[Job]:
    ids = iter(f"job-{number}" for number in range(count))
    limits = JobLimits(max_prompt_tokens=32, max_completion_tokens=40)
    departures = Departures(jobs._redis, kept_s=600)
    intake = Intake(
        books,
        jobs,
        in_flight_limit,
        limits,
        departures,
        Draining(jobs._redis, jobs),
        now_ms=lambda: 1_000,
        new_job_id=lambda: next(ids),
    )
    await fund(books, DEPOSITED)
    await books.open_key(signed_key())
    for node, owner in zip("abc", OWNERS, strict=False):
        await books.enrol_node(node, owner, key_digest="k", name=node, work_bytes_per_s=0)
    facts = {"model_id": MODEL.model_id, "revision": "r1", "num_layers": 4}
    await books.reserve(BEARER, LOST, **facts, prompt_tokens=4, max_tokens=10)
    key, accepted = await books.key(BEARER), []
    for _ in range(count):
        prompt = tuple(range(1, dice.randint(2, 6)))
        sampling = SamplingParams(max_tokens=dice.randint(1, 3))
        accepted.append(await intake.accept(key, BEARER, MODEL, prompt, sampling))
    if dice.random() < 0.3:
        await jobs.cancel(accepted[0].job_id)
    return accepted


async def all_ended(redis_url: str, accepted: list[Job]) -> bool:
    async with connect_redis(redis_url) as connections:
        jobs = RedisJobs(connections)
        records = [await jobs.get(job.job_id) for job in accepted]
    return all(record is not None and record.outcome is not None for record in records)


async def assert_settled_once(redis_url: str, served: ServedBooks, accepted: list[Job]) -> None:
    """Every job's outcome is that of the books, and no reservation is left."""
    books = served.client()
    async with connect_redis(redis_url) as connections:
        jobs = RedisJobs(connections)
        for _ in range(2):
            for job_id in await books.overdue():
                if await jobs.give_up(job_id):
                    await books.expire(job_id)
        lost, charged = await books.ended(LOST), 0
        assert lost is not None
        assert lost.receipt.transfer_id == f"expire:{LOST}"
        for job in accepted:
            record = await jobs.get(job.job_id)
            assert record is not None
            assert record.outcome is not None
            assert record.outcome == await books.ended(job.job_id)
            charged += record.outcome.receipt.charged_lamports
    assert await books.balance(USER.address.lower()) == UserBalance(DEPOSITED - charged, 0, 0)
    report = await books.audit()
    await books.close()
    assert report.agrees, report.findings


def run_until_ended(
    redis_url: str, served: ServedBooks, accepted: list[Job], at: int, when: str, seed: int
) -> bool:
    """Run until every job has ended, restarting a process that died; return True if the first one died."""
    books_url = served.access.url("scheduler")
    running = [start_settling(redis_url, books_url, death=Death(at, when), seed=seed)]
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not asyncio.run(all_ended(redis_url, accepted)):
            assert time.monotonic() < deadline, f"killed {when} write {at}: a job did not end"
            if not running[-1].is_alive():
                running.append(start_settling(redis_url, books_url, seed=seed + 1))
            time.sleep(0.01)
        # The last write comes after the last outcome.
        running[0].join(0.1)
        return not running[0].is_alive()
    finally:
        for process in running:
            process.kill()
            process.join(10)


def kill_at_every_write(redis_url: str, when: str, seed: int, jobs: int) -> int:
    """Kill a process at its first write, the next one at its second, and so on; return how many died."""
    terms = replace(TERMS, reservation_ttl_ms=1)
    for at in range(1, MOST_EFFECTS):
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        with served(redis_url, terms=terms) as books:
            accepted = asyncio.run(submitted(redis_url, books, random.Random(f"{seed}-{at}"), jobs))
            died = run_until_ended(redis_url, books, accepted, at, when, seed)
            asyncio.run(assert_settled_once(redis_url, books, accepted))
        if not died:
            return at - 1
    raise AssertionError(f"the process makes more than {MOST_EFFECTS} writes")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_killed_at_every_write_settles_once(redis_url: str, when: str) -> None:
    assert kill_at_every_write(redis_url, when, SEED, jobs=1) >= 4


@pytest.mark.prove
@pytest.mark.parametrize("run", range(20))
@pytest.mark.parametrize("when", ["before", "after"])
def test_processes_killed_at_every_write_of_many_histories_settle_once(
    redis_url: str, figures: Counter[str], when: str, run: int
) -> None:
    deaths = kill_at_every_write(redis_url, when, SEED + run, jobs=2)
    assert deaths >= 8
    figures["settling processes killed; lamports lost, paid twice or stuck: 0"] += deaths
