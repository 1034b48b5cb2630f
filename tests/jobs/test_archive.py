"""After a day a finished job is a few hundred bytes in Redis, and its receipt, state and price stay."""

import asyncio
import hashlib
from dataclasses import replace

import pytest

from azu.jobs import redis as redis_module
from azu.jobs.archive import ARCHIVE, pack, shared_text, unpack
from azu.jobs.record import ENDED, JobRecord, address_key, job_key, tokens_key
from azu.jobs.redis import TOKENS_KEPT_S, RedisJobs
from azu.money.ledger.journal import JOURNAL
from azu.protocol.job import FinishReason, JobOutcome, JobRun, JobState, Placement, TokenEvent
from tests.builders import ALICE, job
from tests.jobs.endings import outcome
from tests.jobs.test_settlement import Billing

DAY_MS = 24 * 3600 * 1000
NOW_MS = 10**12
PLACED = tuple(
    Placement(
        node=f"workshop-{index}", actor=f"stage-{index}-of-tiny-dense-{index:08x}", layers=(index, index + 1)
    )
    for index in range(8)
)
WORK = {layer: {f"node-{layer % 2}": 10**6 + layer} for layer in range(4)}
MAX_BYTES = 600


def recorded(ended: JobOutcome) -> JobRecord:
    return JobRecord(job(ended.receipt.job_id), ended.state, ended, 1)


@pytest.mark.parametrize(
    "ended",
    [
        outcome("job-00ff00ff00ff00ff00ff00ff"),
        outcome("job-1", state=JobState.CANCELLED, finish_reason=FinishReason.CANCELLED),
        replace(
            outcome("job-2", state=JobState.FAILED, finish_reason=FinishReason.ERROR),
            error={"message": "worker € lost", "type": "server_error", "param": None, "code": "worker_lost"},
        ),
    ],
)
def test_an_archived_job_keeps_its_outcome_and_what_lists_show(ended: JobOutcome) -> None:
    record = replace(recorded(ended), job=job(ended.receipt.job_id, key_id="key-7"))
    digest, like = shared_text(outcome("job-another"))

    found = unpack(record.job.job_id, pack(record, digest, like), like)

    assert (found.outcome, found.state) == (ended, ended.state)
    assert found.job.address == record.job.address
    assert found.job.created_at_ms == record.job.created_at_ms
    assert found.job.key_id == "key-7"
    assert found.job.prompt_token_ids == ()
    assert found.job.reserved_lamports == 48 + 64


def test_an_archived_job_of_before_has_no_key() -> None:
    record = recorded(outcome("job-1"))
    digest, like = shared_text(outcome("job-another"))

    found = unpack("job-1", pack(record, digest, like), like)

    assert record.job.key_id == found.job.key_id == ""
    assert found.outcome == record.outcome


def test_a_long_error_is_cut_short() -> None:
    record = recorded(
        replace(outcome(state=JobState.FAILED), error={"message": "x" * 4096, "code": "unavailable"})
    )
    digest, like = shared_text(outcome())

    found = unpack("job-1", pack(record, digest, like), like)

    assert found.outcome is not None
    assert found.outcome.error == {"message": "x" * 200, "code": "unavailable"}


def test_only_jobs_that_ended_a_day_ago_are_archived_and_a_sweep_may_be_repeated(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(3):
            await jobs.submit(job(f"job-{n}"))
        await jobs.finish("job-0", outcome("job-0"))
        await jobs.finish("job-1", outcome("job-1"))
        ended_ms = int(await jobs._redis.zscore(ENDED, "job-0") or 0)
        await jobs._redis.zadd(ENDED, {"job-1": ended_ms + 5})
        for _ in range(2):
            await jobs.archive(ended_ms + DAY_MS, DAY_MS)

        assert await jobs._redis.exists(*(job_key(f"job-{n}") for n in range(3))) == 2
        assert [record.job.job_id for record in await jobs.of(ALICE, 9)] == ["job-2", "job-1", "job-0"]
        assert (await jobs.get("job-0")).outcome == outcome("job-0")
        assert [event async for event in jobs.events("job-0")] == [outcome("job-0")]
        assert await jobs.get("job-3") is None

    run_scenario(scenario)


def test_an_account_lists_its_latest_jobs_for_a_while(run_scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_module, "LISTED_JOBS", 20)

    async def scenario(jobs: RedisJobs) -> None:
        for n in range(25):
            await jobs.submit(job(f"job-{n}", created_at_ms=NOW_MS + n))
        assert await jobs._redis.zcard(address_key(ALICE)) == 20
        await jobs.submit(job("job-new", created_at_ms=NOW_MS + 91 * DAY_MS))
        assert [record.job.job_id for record in await jobs.of(ALICE, 9)] == ["job-new"]
        assert 0 < await jobs._redis.pttl(address_key(ALICE)) <= 90 * DAY_MS

    run_scenario(scenario)


async def used(jobs: RedisJobs) -> int:
    """Return the bytes of all keys but the ledger's journal."""
    keys = [key async for key in jobs._redis.scan_iter(count=1000) if key != JOURNAL]
    return sum([await jobs._redis.memory_usage(key, samples=0) or 0 for key in keys])


def test_a_finished_job_takes_at_most_600_bytes_after_a_day_beside_the_journal(redis_url: str) -> None:
    count = 200

    async def scenario() -> None:
        billing = Billing(redis_url)
        jobs = billing.jobs
        await billing.deposit(10**9)
        before = await used(jobs)
        receipts = {}
        for number in range(count):
            job_id = f"job-{hashlib.sha256(str(number).encode()).hexdigest()[:24]}"
            billing.intake._new_job_id = lambda job_id=job_id: job_id
            accepted = await billing.accept(prompt_tokens=20, max_tokens=30)
            tokens = 3 + number % 20
            await jobs.append([(job_id, TokenEvent(0, tuple(range(tokens)), (-0.25,) * tokens))])
            work = {layer: dict.fromkeys(nodes, 10**6 + number) for layer, nodes in WORK.items()}
            # Each job starts the model anew, in a network that is seldom used.
            started = [replace(one, actor=f"{one.actor[:-8]}{job_id[-8:]}") for one in PLACED]
            run = JobRun(tokens, FinishReason.STOP, work, placements=tuple(started))
            receipts[job_id] = (await billing.settlement.settle(accepted, run)).receipt
            await jobs.take("one", 1, 60_000)
            await jobs.done(job_id)
        fresh = (await used(jobs) - before) / count
        # The day passes.
        for key in (*map(tokens_key, receipts), f"azu:auth:flight:{accepted.address}"):
            assert 0 < await jobs._redis.ttl(key) <= TOKENS_KEPT_S
            await jobs._redis.delete(key)
        await jobs.archive(2**52, DAY_MS)
        old = (await used(jobs) - before) / count
        print(f"bytes per job: {fresh:.0f} on its day, {old:.0f} afterwards")

        assert old <= MAX_BYTES
        assert await jobs._redis.hlen(ARCHIVE) == count + 1
        for one, receipt in receipts.items():
            record, ended = await jobs.get(one), await billing.books.ended(one)
            assert record is not None
            assert record.outcome == ended
            assert ended is not None
            assert ended.receipt == receipt

    asyncio.run(scenario())


def test_an_ended_job_that_cannot_be_read_leaves_and_the_others_are_archived(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        for n in range(2):
            await jobs.submit(job(f"job-{n}"))
            await jobs.finish(f"job-{n}", outcome(f"job-{n}"))
        await jobs._redis.hset(job_key("job-0"), "outcome", "{}")

        await jobs.archive(2**52, DAY_MS)

        assert await jobs._redis.zcard(ENDED) == 0
        assert await jobs.get("job-0") is None
        assert (await jobs.get("job-1")).outcome == outcome("job-1")

    run_scenario(scenario)
