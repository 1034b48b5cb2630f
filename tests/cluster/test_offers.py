"""Who asks what a machine would hold needs no key, and fills nothing."""

import asyncio

import pytest

from azu.cluster.offers import Layers, Offers
from azu.errors import Unavailable
from azu.protocol.node import Node
from azu.units import GIB
from tests.builders import node

SMALL, LARGE = node("small", 2 * GIB), node("large", 80 * GIB)


class Plans:
    """Plans that end when the test says so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_end = asyncio.Event()

    async def would_hold(self, asked: Node) -> Layers:
        self.asked.append(asked.node_id)
        await self.may_end.wait()
        return {"m/one": (len(self.asked), 6)}


def test_one_offer_is_planned_at_a_time_and_no_other_caller_waits() -> None:
    async def scenario() -> None:
        plans = Plans()
        offers = Offers(plans.would_hold)
        plans.may_end.set()
        assert await offers.layers(SMALL) == {"m/one": (1, 6)}

        plans.may_end.clear()
        planned = asyncio.create_task(offers.layers(LARGE))
        await asyncio.sleep(0)
        for _ in range(1000):
            with pytest.raises(Unavailable):
                await offers.layers(LARGE)
            assert await offers.layers(SMALL) == {"m/one": (1, 6)}, "the last answer for such a device"
        plans.may_end.set()
        assert await planned == {"m/one": (2, 6)}
        assert plans.asked == ["small", "large"]
        assert await offers.layers(SMALL) == {"m/one": (3, 6)}

    asyncio.run(scenario())


def test_a_plan_that_takes_long_keeps_no_caller_and_no_second_one_begins_beside_it() -> None:
    async def scenario() -> None:
        plans = Plans()
        offers = Offers(plans.would_hold, wait_s=0.01)
        for _ in range(3):
            with pytest.raises(Unavailable):
                await offers.layers(LARGE)
        assert plans.asked == ["large"]

        plans.may_end.set()
        assert offers._planning is not None
        await offers._planning
        offers._wait_s = 20.0
        assert await offers.layers(LARGE) == {"m/one": (2, 6)}

    asyncio.run(scenario())


def test_the_answers_for_the_latest_devices_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.cluster.offers._KEPT_DEVICES", 2)

    async def scenario() -> None:
        plans = Plans()
        offers = Offers(plans.would_hold)
        plans.may_end.set()
        devices = [node(f"n{gib}", gib * GIB) for gib in (1, 2, 3)]
        for one in devices:
            await offers.layers(one)

        plans.may_end.clear()
        planned = asyncio.create_task(offers.layers(LARGE))
        await asyncio.sleep(0)
        assert [await offers.layers(one) for one in devices[1:]] == [{"m/one": (2, 6)}, {"m/one": (3, 6)}]
        with pytest.raises(Unavailable):
            await offers.layers(devices[0])
        plans.may_end.set()
        await planned

    asyncio.run(scenario())
