"""The records of deployments outlive the scheduler, and an epoch is never given twice."""

import asyncio

import redis

from azu.cluster.deployment_store import EPOCH, DeploymentStore
from tests.builders import OWNERS, node


def test_epochs_grow_also_where_redis_lost_the_last_ones(redis_url: str) -> None:
    async def scenario() -> None:
        store = DeploymentStore.from_url(redis_url)
        assert [await store.next_epoch() for _ in range(3)] == [1, 2, 3]
        with redis.Redis.from_url(redis_url) as client:
            client.set(EPOCH, 1)

        assert [await store.next_epoch() for _ in range(2)] == [4, 5]
        assert await DeploymentStore.from_url(redis_url).next_epoch() == 6

    asyncio.run(scenario())


def test_the_next_scheduler_knows_what_owners_earned(redis_url: str) -> None:
    async def scenario() -> None:
        store = DeploymentStore.from_url(redis_url)
        earnings = await store.earnings()
        assert earnings.by_owner == {}
        for now_s in (0, 600):
            earnings.lend([node("a", payout_address=OWNERS[0])], now_s)
        earnings.earn({OWNERS[0]: 7})
        await store.keep_earnings(earnings)

        assert (await DeploymentStore.from_url(redis_url).earnings()).by_owner == earnings.by_owner

    asyncio.run(scenario())
