"""The treasury's durable state in a real Redis, read and written by two processes."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from azu.errors import Unavailable
from azu.metrics import FAULTS, Meter
from azu.money.treasury import redis as module
from azu.money.treasury.outbox import Payout, PayoutState, decode_payout, encode_payout
from azu.money.treasury.redis import (
    METRICS,
    RedisCursor,
    RedisLease,
    RedisMetrics,
    RedisOutbox,
    RedisUncredited,
    Uncredited,
)
from azu.redis_client import connect_redis

PAYOUT = Payout(
    payout_id="payout:1",
    address="0x" + "0e" * 20,
    lamports=10**17,
    planned_at_ms=1_790_000_000_000,
    since_ms=5,
)
SIGNED = PAYOUT.numbered(1_790_000_000_001).signed('{"action":{}}')


def run(redis_url: str, scenario: Callable[[Redis], Coroutine[Any, Any, None]]) -> None:
    async def inside() -> None:
        redis = connect_redis(redis_url)
        try:
            await scenario(redis)
        finally:
            await redis.aclose()

    asyncio.run(inside())


def test_what_the_treasury_shows_of_its_loops_is_read_as_it_is(redis_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        shown, meter = RedisMetrics(redis), Meter()
        assert await shown.read() is None
        meter.count(FAULTS, 3, "treasury", "payouts")

        await shown.show("treasury-1", meter.snapshot())

        assert await shown.read() == ("treasury-1", meter.snapshot())
        assert await redis.ttl(METRICS) > 0

    run(redis_url, scenario)


def test_a_cursor_only_moves_forward(redis_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        cursor = RedisCursor(redis)
        assert await cursor.read() == 0
        for time_ms in (1_790_000_000_002, 1_790_000_000_001, 0):
            await cursor.advance(time_ms)
        assert await RedisCursor(redis).read() == 1_790_000_000_002

    run(redis_url, scenario)


def test_an_outbox_keeps_a_payout_through_its_states(redis_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        outbox = RedisOutbox(redis)
        assert await outbox.add(PAYOUT)
        assert await outbox.replace(PAYOUT, SIGNED)
        assert await RedisOutbox(redis).open() == (SIGNED,)
        assert await outbox.remove(SIGNED)
        assert await outbox.open() == ()

    run(redis_url, scenario)


def test_a_repeated_write_gives_the_same_answer(redis_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        outbox = RedisOutbox(redis)
        assert [await outbox.add(PAYOUT) for _ in range(2)] == [True, True]
        assert [await outbox.replace(PAYOUT, SIGNED) for _ in range(2)] == [True, True]
        assert [await outbox.remove(SIGNED) for _ in range(2)] == [True, True]

    run(redis_url, scenario)


def test_a_process_that_read_an_older_state_changes_nothing(redis_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        outbox = RedisOutbox(redis)
        await outbox.add(PAYOUT)
        await outbox.replace(PAYOUT, SIGNED)

        assert not await outbox.add(replace(PAYOUT, payout_id="payout:2"))
        assert not await outbox.replace(PAYOUT, PAYOUT.failed("old"))
        assert not await outbox.remove(PAYOUT)
        assert await outbox.open() == (SIGNED,)

    run(redis_url, scenario)


def test_one_treasury_holds_the_lease_until_it_is_released_or_silent(redis_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        first, second = RedisLease(redis, ttl_ms=60_000), RedisLease(redis, ttl_ms=50)
        assert await first.hold()
        assert not await second.hold()
        assert await first.hold()
        await second.release()
        assert not await second.hold()
        await first.release()
        assert await second.hold()
        await asyncio.sleep(0.5)
        assert await first.hold()

    run(redis_url, scenario)


def test_a_redis_that_is_away_is_unavailable() -> None:
    async def scenario(redis: Redis) -> None:
        with pytest.raises(Unavailable):
            await RedisOutbox(redis).open()

    run("redis://127.0.0.1:9/0", scenario)


def test_a_payout_written_before_a_field_existed_is_read_and_written_the_same() -> None:
    assert encode_payout(decode_payout(encode_payout(SIGNED))) == encode_payout(SIGNED)
    assert "burned_at_ms" not in encode_payout(SIGNED)
    assert decode_payout(encode_payout(PAYOUT)).state is PayoutState.PLANNED


def test_only_the_latest_uncredited_transfers_are_kept(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UNCREDITED_KEPT", 2)

    async def scenario(redis: Redis) -> None:
        uncredited = RedisUncredited(redis)
        for time_ms in (3, 1, 4, 2):
            await uncredited.add(Uncredited(time_ms, "0x0", PAYOUT.address, "HYPE", "1.0", "why"))
        assert [one.time_ms for one in await uncredited.all()] == [4, 3]

    run(redis_url, scenario)
