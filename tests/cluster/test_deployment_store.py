"""The records of deployments outlive the scheduler, and an epoch is never given twice."""

import asyncio

import redis

from azu.cluster.deployment_store import (
    CANARY,
    EPOCH,
    MODELS,
    DeploymentRecord,
    DeploymentStore,
    deployed_models,
)
from tests.builders import OWNERS, node, topology


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


def test_a_record_that_cannot_be_read_keeps_no_other(redis_url: str) -> None:
    async def scenario() -> None:
        store = DeploymentStore.from_url(redis_url)
        kept = DeploymentRecord(topology({"a": (0, 4)}), (), "pipeline")
        await store.keep(kept)
        with redis.Redis.from_url(redis_url) as client:
            client.hset(MODELS, "m/odd@r1#0", '{"topology": "of another release"}')
            client.hset(CANARY, "m/odd@r1@float32", "no answer")
            assert deployed_models(redis_url) == {kept.topology.key[:2]}
            assert await store.all() == [kept]
            assert client.hlen(MODELS) == 1
        assert await store.canary(("m/odd", "r1", "float32")) is None

    asyncio.run(scenario())
