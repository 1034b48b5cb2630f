"""A reservation expires when its job was never written, and only then."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from azu.errors import Unavailable
from azu.jobs.redis import RedisJobs
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.transfers import user_available, user_reserved
from azu.money.treasury.expired_reservations import ReservationExpiry
from azu.redis_client import connect_redis
from tests.builders import ALICE, job
from tests.money.ledger import moves
from tests.money.ledger.opened import apply_all

NOW_MS = 700_000
Scenario = Callable[[RedisLedger, RedisJobs, ReservationExpiry], Coroutine[Any, Any, None]]


def play(url: str, scenario: Scenario) -> None:
    async def run() -> None:
        redis = connect_redis(url)
        ledger, jobs = RedisLedger(redis), RedisJobs(redis)
        try:
            await scenario(ledger, jobs, ReservationExpiry(ledger, jobs.give_up, now_ms=lambda: NOW_MS))
        finally:
            await redis.aclose()

    asyncio.run(run())


async def held(ledger: RedisLedger) -> tuple[int, int]:
    return await ledger.balance(user_available(ALICE)), await ledger.balance(user_reserved(ALICE))


def test_the_reservation_of_a_lost_job_is_returned_once(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger, jobs: RedisJobs, sweeper: ReservationExpiry) -> None:
        await apply_all(ledger, moves.deposit(100), moves.reserve("job-1", 60, expires_at_ms=NOW_MS))
        await sweeper.sweep()
        await sweeper.sweep()
        assert await held(ledger) == (100, 0)

    play(redis_url, scenario)


def test_a_reservation_stands_until_its_time(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger, jobs: RedisJobs, sweeper: ReservationExpiry) -> None:
        await apply_all(ledger, moves.deposit(100), moves.reserve("job-1", 60, expires_at_ms=NOW_MS + 1))
        await sweeper.sweep()
        assert await held(ledger) == (40, 60)

    play(redis_url, scenario)


def test_a_written_job_keeps_its_reservation_however_old(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger, jobs: RedisJobs, sweeper: ReservationExpiry) -> None:
        await apply_all(ledger, moves.deposit(100), moves.reserve("job-1", 60, expires_at_ms=1))
        await jobs.submit(job("job-1"))
        await sweeper.sweep()
        assert await held(ledger) == (40, 60)
        assert not (await ledger.apply(moves.settle("job-1", 60, w0=48))).repeated

    play(redis_url, scenario)


def test_a_job_written_after_its_reservation_expired_is_not_run(redis_url: str) -> None:
    async def scenario(ledger: RedisLedger, jobs: RedisJobs, sweeper: ReservationExpiry) -> None:
        await apply_all(ledger, moves.deposit(100), moves.reserve("job-1", 60, expires_at_ms=1))
        await sweeper.sweep()
        with pytest.raises(Unavailable):
            await jobs.submit(job("job-1"))
        assert await jobs.take("scheduler", 1, 1) == []

    play(redis_url, scenario)


def test_a_second_sweep_ends_what_a_killed_one_left_between_job_and_money(
    redis_url: str,
) -> None:
    async def scenario(ledger: RedisLedger, jobs: RedisJobs, sweeper: ReservationExpiry) -> None:
        await apply_all(ledger, moves.deposit(100), moves.reserve("job-1", 60, expires_at_ms=1))
        assert await jobs.give_up("job-1")
        await sweeper.sweep()
        assert await held(ledger) == (100, 0)

    play(redis_url, scenario)
