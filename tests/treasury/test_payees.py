"""Earnings are paid to addresses that claimed them by their own signature."""

import asyncio

from eth_account import Account

from azu.auth.payees import sign_claim
from azu.connection import connect_redis
from azu.treasury.payees import RedisPayees

OWNER = Account.from_key("0x" + "07" * 32)
MALLORY = Account.from_key("0x" + "08" * 32)
ADDRESS = OWNER.address.lower()
PLATFORM, OTHER_PLATFORM = "0x" + "99" * 20, "0x" + "98" * 20


def test_an_address_has_claimed_once_it_signed(redis_url: str) -> None:
    async def scenario() -> None:
        redis = connect_redis(redis_url)
        payees = RedisPayees(redis, PLATFORM)
        assert not await payees.has_claimed(ADDRESS)
        for signature in (sign_claim(MALLORY, PLATFORM), sign_claim(OWNER, OTHER_PLATFORM), "0x", "zz"):
            assert not await payees.claim(ADDRESS, signature)
        assert not await payees.has_claimed(ADDRESS)

        assert await payees.claim(ADDRESS, sign_claim(OWNER, PLATFORM))
        assert await payees.has_claimed(ADDRESS)
        assert not await RedisPayees(redis, OTHER_PLATFORM).has_claimed(ADDRESS)
        await redis.aclose()

    asyncio.run(scenario())


def test_a_claim_that_somebody_wrote_there_without_a_signature_is_none(redis_url: str) -> None:
    async def scenario() -> None:
        redis = connect_redis(redis_url)
        await redis.hset("azu:treasury:payees", ADDRESS, sign_claim(MALLORY, PLATFORM))
        assert not await RedisPayees(redis, PLATFORM).has_claimed(ADDRESS)
        await redis.aclose()

    asyncio.run(scenario())
