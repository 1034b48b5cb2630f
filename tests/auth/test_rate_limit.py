"""A bucket gives its burst at once and then as fast as it refills, to all ingresses together."""

import asyncio
from pathlib import Path

import pytest

from azu.auth.key_records import secret_digest
from azu.auth.rate_limit import Growth, Rate, RedisRates, WrongKeys
from azu.errors import RateLimited, Unauthenticated
from azu.redis_client import connect_redis, connect_redis_sync
from tests.redis_server import start_redis


async def taken(rates: RedisRates, name: str, rate: Rate, times: int) -> list[float]:
    """Take a number of times at once; return the waits of the refused requests."""
    answers = await asyncio.gather(*(rates.take(name, rate) for _ in range(times)), return_exceptions=True)
    refused = [answer for answer in answers if answer is not None]
    assert all(isinstance(answer, RateLimited) for answer in refused)
    return [answer.retry_after_s for answer in refused if isinstance(answer, RateLimited)]


def test_the_burst_is_given_at_once_and_no_more(redis_url: str) -> None:
    async def scenario() -> None:
        one, other = RedisRates(connect_redis(redis_url)), RedisRates(connect_redis(redis_url))
        slow = Rate(per_minute=1, burst=5)

        refused = await taken(one, "key-1", slow, 4) + await taken(other, "key-1", slow, 40)

        assert len(refused) == 39
        assert all(50 < wait_s <= 60 for wait_s in refused)
        assert await taken(one, "key-2", slow, 5) == []

    asyncio.run(scenario())


def test_a_caller_that_waits_as_long_as_the_refusal_says_is_served(redis_url: str) -> None:
    async def scenario() -> None:
        rates, fast = RedisRates(connect_redis(redis_url)), Rate(per_minute=1200, burst=1)
        await rates.take("key", fast)
        refused = await taken(rates, "key", fast, 20)
        assert refused

        await asyncio.sleep(max(refused) + 0.01)

        await rates.take("key", fast)

    asyncio.run(scenario())


def test_buckets_expire_and_are_not_written_to_disk(tmp_path: Path) -> None:
    server = start_redis(tmp_path, {"appendonly": "yes", "appendfsync": "always"})
    try:
        asyncio.run(RedisRates(connect_redis(server.url)).take("key", Rate(per_minute=60, burst=5)))
        with connect_redis_sync(server.url) as redis:
            assert 0 < redis.pttl("azu:auth:rate:key") <= 1000
            redis.set("written", "1")
    finally:
        server.stop()

    [log] = [path.read_bytes() for path in tmp_path.rglob("*.incr.aof")]
    assert b"written" in log
    assert b"azu:auth:rate" not in log


def test_limits_grow_with_what_was_paid_up_to_a_ceiling() -> None:
    growth, rate = Growth(lamports=100, most=8), Rate(per_minute=1200, burst=200)
    assert [growth.times(paid) for paid in (0, 50, 100, 700, 10**12)] == [1, 1.5, 2, 8, 8]
    assert rate.times(1.5) == Rate(per_minute=1800, burst=300)
    assert Rate(per_minute=60_000_000, burst=1).times(8).per_minute == 60_000_000


async def judge(secret: str) -> str:
    """Know one key as the books do."""
    if not secret.startswith("good"):
        raise Unauthenticated("not one of ours")
    return secret


async def wrong(keys: WrongKeys, address: str, times: int) -> list[type[BaseException]]:
    """Try as many wrong keys; return what came of each."""
    tried = (keys.judged(f"guess-{number}", address, judge) for number in range(times))
    return [type(answer) for answer in await asyncio.gather(*tried, return_exceptions=True)]


def test_an_address_tries_so_many_wrong_keys_and_then_finds_none_out(redis_url: str) -> None:
    async def scenario() -> None:
        keys = WrongKeys(RedisRates(connect_redis(redis_url)))
        assert await keys.judged("good-1", "2001:db8::1", judge) == "good-1"

        kinds = [kind for _ in range(3) for kind in await wrong(keys, "2001:db8::2", 40)]

        assert kinds[:40] == [Unauthenticated] * 40
        assert set(kinds[40:]) == {Unauthenticated, RateLimited}
        with pytest.raises(RateLimited, match="wrong keys") as refused:
            await keys.judged("good-2", "2001:db8::3", judge)
        assert 0 < refused.value.retry_after_s <= 2
        # Who uses the network from there goes on, and so does every other address.
        keys.note_good(secret_digest("good-3"))
        for known in ("good-1", "good-3"):
            assert await keys.judged(known, "2001:db8::3", judge) == known
        assert await keys.judged("good-2", "192.0.2.1", judge) == "good-2"

    asyncio.run(scenario())


def test_a_key_that_is_good_no_more_counts_as_wrong_and_no_key_as_none(redis_url: str) -> None:
    async def scenario() -> None:
        keys = WrongKeys(RedisRates(connect_redis(redis_url)))
        for number in range(200):
            with pytest.raises(Unauthenticated):
                await keys.judged("", f"192.0.2.{number % 2}", judge)
            keys.note_good(secret_digest(f"good-{number}"))
        keys.note_good(secret_digest("revoked"))
        with pytest.raises(Unauthenticated):
            await keys.judged("revoked", "192.0.2.1", judge)
        assert secret_digest("revoked") not in keys._good

    asyncio.run(scenario())


def test_the_latest_good_keys_are_remembered(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.auth.rate_limit._KEPT_GOOD", 2)
    keys = WrongKeys(RedisRates(connect_redis(redis_url)))
    for digest in ("one", "two", "one", "three"):
        keys.note_good(digest)

    assert list(keys._good) == ["one", "three"]
