"""The settling process is killed at every write: no lamport is lost, paid twice or stuck."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis

from azu.jobs.in_flight_limit import InFlightLimit
from azu.jobs.intake import Intake, JobLimits
from azu.jobs.redis import RedisJobs
from azu.money.bookkeeping import Bookkeeper
from azu.money.ledger.audit import audit
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.transfers import (
    CHAIN,
    Deposit,
    Expire,
    Release,
    Reserve,
    Settle,
    user_available,
    user_reserved,
)
from azu.money.treasury.expired_reservations import ReservationExpiry
from azu.protocol.job import Job
from azu.protocol.sampling import SamplingParams
from azu.redis_client import connect_redis
from tests.builders import ALICE, api_key
from tests.jobs.settling import PRICE, start_settling
from tests.jobs.test_settlement import MODEL
from tests.killing import Death
from tests.money.treasury.world import SEED

DEPOSITED = 100_000
LOST = "job-lost"
MOST_EFFECTS = 200
TIMEOUT_S = 30.0


@asynccontextmanager
async def books(redis_url: str) -> AsyncIterator[tuple[RedisLedger, RedisJobs]]:
    connections = connect_redis(redis_url)
    try:
        yield RedisLedger(connections), RedisJobs(connections)
    finally:
        await connections.aclose()


async def submitted(redis_url: str, dice: random.Random, count: int) -> list[Job]:
    """Deposit, submit jobs (sometimes cancel the first), and reserve for a job that is never written."""
    async with books(redis_url) as (ledger, jobs):
        in_flight_limit = InFlightLimit(connect_redis(redis_url), jobs, 10_000)
        return await submit(ledger, jobs, Bookkeeper.from_url(redis_url), in_flight_limit, dice, count)


async def submit(
    ledger: RedisLedger,
    jobs: RedisJobs,
    books: Bookkeeper,
    in_flight_limit: InFlightLimit,
    dice: random.Random,
    count: int,
) -> list[Job]:
    ids = iter(f"job-{number}" for number in range(count))
    limits = JobLimits(max_prompt_tokens=32, max_completion_tokens=40, reservation_ttl_ms=1)
    intake = Intake(
        books,
        jobs,
        in_flight_limit,
        limits,
        PRICE,
        now_ms=lambda: 1_000,
        new_job_id=lambda: next(ids),
    )  # fmt: skip
    await ledger.apply(Deposit(id="deposit:0x1", address=ALICE, lamports=DEPOSITED))
    lost = Reserve(id="reserve:lost", address=ALICE, job_id=LOST, lamports=500, expires_at_ms=1_000)
    await ledger.apply(lost)
    accepted = []
    for _ in range(count):
        prompt = tuple(range(1, dice.randint(2, 6)))
        sampling = SamplingParams(max_tokens=dice.randint(1, 3))
        accepted.append(await intake.accept(api_key(), MODEL, prompt, sampling))
    if dice.random() < 0.3:
        await jobs.cancel(accepted[0].job_id)
    return accepted


async def all_ended(redis_url: str, accepted: list[Job]) -> bool:
    async with books(redis_url) as (_, jobs):
        records = [await jobs.get(job.job_id) for job in accepted]
    return all(record is not None and record.outcome is not None for record in records)


async def assert_settled_once(redis_url: str, accepted: list[Job]) -> None:
    async with books(redis_url) as (ledger, jobs):
        await assert_books(ledger, jobs, accepted)


async def assert_books(ledger: RedisLedger, jobs: RedisJobs, accepted: list[Job]) -> None:
    """Every job's receipt agrees with the ledger, and no reservation is left."""
    expiry = ReservationExpiry(ledger, jobs.give_up)
    await expiry.sweep()
    await expiry.sweep()
    entries = [entry async for entry in ledger.journal()]
    ends = [entry.transfer for entry in entries if isinstance(entry.transfer, Settle | Release | Expire)]
    by_job = {transfer.job_id: transfer for transfer in ends}
    assert len(ends) == len(by_job) == len(accepted) + 1
    assert isinstance(by_job[LOST], Expire)
    charged = 0
    for job in accepted:
        record = await jobs.get(job.job_id)
        assert record is not None
        assert record.outcome is not None
        receipt, end = record.outcome.receipt, by_job[job.job_id]
        charged += receipt.charged_lamports
        assert receipt.transfer_id == end.id
        if isinstance(end, Settle):
            assert (end.charged_lamports, end.platform_lamports) == (
                receipt.charged_lamports,
                receipt.platform_lamports,
            )
            assert dict(end.shares) == dict(receipt.worker_lamports)
        else:
            assert receipt.charged_lamports == 0
    balances = await ledger.balances()
    assert sum(balances.values()) == 0
    assert balances[CHAIN] == -DEPOSITED
    assert balances[user_reserved(ALICE)] == 0
    assert balances[user_available(ALICE)] == DEPOSITED - charged
    report = await audit(await ledger.snapshot(), ledger.journal())
    assert report.agrees, report.findings


def run_until_ended(redis_url: str, accepted: list[Job], at: int, when: str, seed: int) -> bool:
    """Run until every job has ended, restarting a process that died; return True if the first one died."""
    running = [start_settling(redis_url, death=Death(at, when), seed=seed)]
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not asyncio.run(all_ended(redis_url, accepted)):
            assert time.monotonic() < deadline, f"killed {when} write {at}: a job did not end"
            if not running[-1].is_alive():
                running.append(start_settling(redis_url, seed=seed + 1))
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
    for at in range(1, MOST_EFFECTS):
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        accepted = asyncio.run(submitted(redis_url, random.Random(f"{seed}-{at}"), jobs))
        died = run_until_ended(redis_url, accepted, at, when, seed)
        asyncio.run(assert_settled_once(redis_url, accepted))
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
