"""The treasury is killed before and after every write and send: nothing is lost, paid twice or stuck."""

import asyncio
import random
from collections import Counter

import pytest

from tests.killing import Death
from tests.money.chain.running import running_devnet
from tests.money.treasury.histories import play
from tests.money.treasury.world import SEED, World
from tests.redis_server import RunningRedis

# The number of histories that run at once, each in its own database.
LANES = 5
MOST_EFFECTS = 200


def killed_everywhere(server: RunningRedis, when: str, seed: int) -> int:
    """Kill a treasury at its first effect, the next at its second, and so on; return how many died."""
    effects, survived = iter(range(1, MOST_EFFECTS)), asyncio.Event()
    deaths = 0

    async def lane(number: int) -> None:
        nonlocal deaths
        url = server.url.removesuffix("/0") + f"/{number}"
        while not survived.is_set():
            death = Death(next(effects), when)
            if await play(World(devnet, url), random.Random(f"{seed}-{death}"), death):
                deaths += 1
            else:
                survived.set()

    async def lanes() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(1, LANES + 1):
                group.create_task(lane(number))

    with running_devnet(seed=seed) as devnet:
        devnet.fault("reply_dropped_after", times=None, chance=0.1)
        devnet.fault("rows_twice", times=None, chance=0.2)
        devnet.fault("rows_late", times=None, chance=0.1, seconds=0.3)
        asyncio.run(lanes())
    return deaths


def test_it_is_killed_at_its_first_write(redis_server: RunningRedis) -> None:
    with running_devnet() as devnet:
        world = World(devnet, redis_server.url)
        assert asyncio.run(play(world, random.Random(SEED), Death(1, "after")))


@pytest.mark.prove
@pytest.mark.parametrize("run", range(20))
@pytest.mark.parametrize("when", ["before", "after"])
def test_it_is_killed_at_every_write_and_send(
    redis_server: RunningRedis, figures: Counter[str], when: str, run: int
) -> None:
    deaths = killed_everywhere(redis_server, when, SEED + run)

    figures["treasuries killed; lamports lost, paid twice or stuck: 0"] += deaths
    assert deaths >= 20
