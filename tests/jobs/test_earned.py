"""What addresses earned is told by the hour and the model, once for each job."""

from dataclasses import replace

from azu.jobs.earned import EARNED, KEPT_DAYS, EarnedByHour
from azu.jobs.redis import RedisJobs
from tests.builders import ALICE, OWNERS, job
from tests.jobs.endings import outcome

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


async def ended(jobs: RedisJobs, job_id: str, model_id: str, **shares: int) -> None:
    await jobs.submit(job(job_id))
    end = outcome()
    given = {OWNERS[0]: shares.get("ada", 0), OWNERS[1]: shares.get("ben", 0)}
    receipt = replace(end.receipt, job_id=job_id, model_id=model_id, worker_lamports=given)
    for _ in range(2):  # a settlement that is made again
        await jobs.finish(job_id, replace(end, receipt=receipt))


def test_each_job_counts_once_for_each_address_and_model(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        await ended(jobs, "job-1", "org/one", ada=5, ben=7)
        await ended(jobs, "job-2", "org/one", ada=6)
        await ended(jobs, "job-3", "org/two", ada=1)
        seconds, _ = await jobs._redis.time()
        earned = EarnedByHour(jobs._redis)
        found = await earned.of(OWNERS[0], 1, seconds * 1000)

        # The hour may have ended between two of the jobs.
        sums = {
            model: sum(one.lamports for one in found if one.model_id == model)
            for model in ("org/one", "org/two")
        }
        assert sums == {"org/one": 11, "org/two": 1}
        assert all(0 <= seconds * 1000 - one.at_ms < 2 * HOUR_MS for one in found)
        assert sum(one.lamports for one in await earned.of(OWNERS[1], 1, seconds * 1000)) == 7
        assert await earned.of(ALICE, KEPT_DAYS, seconds * 1000) == ()
        keys = [key async for key in jobs._redis.scan_iter(f"{EARNED}*")]
        lives_s = [await jobs._redis.ttl(key) for key in keys]
        assert all(0 < life_s <= (KEPT_DAYS + 1) * 86_400 for life_s in lives_s)

    run_scenario(scenario)


def test_only_the_days_that_were_asked_for_are_told_the_latest_first(run_scenario) -> None:
    async def scenario(jobs: RedisJobs) -> None:
        now_ms = 100 * DAY_MS + 5 * HOUR_MS
        for hours, lamports in ((0, 1), (23, 2), (26, 3), (24 * KEPT_DAYS - 1, 4)):
            hour = now_ms // HOUR_MS - hours
            await jobs._redis.hset(f"{EARNED}{ALICE}:{hour // 24}", f"{hour}/org/one", lamports)
        earned = EarnedByHour(jobs._redis)

        async def of(days: int) -> list[tuple[int, int]]:
            return [(now_ms - one.at_ms, one.lamports) for one in await earned.of(ALICE, days, now_ms)]

        assert await of(1) == [(0, 1), (23 * HOUR_MS, 2)]
        assert await of(2) == [(0, 1), (23 * HOUR_MS, 2), (26 * HOUR_MS, 3)]
        assert len(await of(KEPT_DAYS)) == len(await of(1000)) == 4

    run_scenario(scenario)
