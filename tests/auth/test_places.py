"""Requests that are open at once."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from azu.auth.places import OF_ONE, PLACES, Places, kind_of
from azu.errors import RateLimited, Unavailable
from deployments.services import MOST_ANSWERS, MOST_SHORT


async def opened(places: Places, owner: str, times: int, kind: str = "short") -> AsyncExitStack:
    """Open requests that stay open until the stack is closed."""
    stack = AsyncExitStack()
    for _ in range(times):
        await stack.enter_async_context(places.place(owner, kind))
    return stack


def test_one_request_too_many_is_refused_until_another_has_ended() -> None:
    async def scenario() -> None:
        places = Places(5, {"short": 3})
        one = await opened(places, "one", 3)
        with pytest.raises(RateLimited, match="3 such requests"):
            await opened(places, "one", 1)
        async with await opened(places, "other", 1), await opened(places, "third", 1):
            with pytest.raises(Unavailable):
                await opened(places, "fourth", 1)
            await one.aclose()
            async with await opened(places, "one", 1), await opened(places, "fourth", 1):
                pass
        assert not places._taken

    asyncio.run(scenario())


def test_a_request_waits_a_moment_for_the_place_of_another_of_its_owner() -> None:
    async def scenario() -> None:
        places = Places(5, {"short": 1})
        first = await opened(places, "one", 1)
        second = asyncio.create_task(opened(places, "one", 1))
        await asyncio.sleep(0)
        await first.aclose()
        await (await second).aclose()
        assert not places._taken

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", PLACES)
def test_no_owner_holds_all_places_of_a_kind_neither_of_the_proxy_nor_of_the_ingress(kind: str) -> None:
    most = MOST_ANSWERS if kind == "answers" else MOST_SHORT
    assert OF_ONE[kind] <= 0.75 * PLACES[kind]
    assert sum(OF_ONE.values()) - OF_ONE["answers"] < MOST_SHORT
    assert OF_ONE[kind] < most

    async def scenario() -> None:
        places = Places(most)
        async with await opened(places, "one", OF_ONE[kind], kind):
            with pytest.raises(RateLimited):
                await opened(places, "one", 1, kind)
            for other in PLACES:
                async with await opened(places, "other", 1, other), await opened(places, "other", 1, kind):
                    pass
                if other != kind:
                    async with await opened(places, "one", 1, other):
                        pass

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/balance", "quick"), ("/v1/auth/keys", "quick"), ("/v1/models", "quick"), ("/submit", "waiting"),
        ("/v1/models/org/name", "waiting"), ("/v1/nodes/ada/leave", "waiting"), ("/results/job-1", "short"),
        ("/v1/jobs", "short"),
    ],
)  # fmt: skip
def test_a_request_has_the_kind_that_the_proxy_gives_it(path: str, kind: str) -> None:
    assert kind_of(path) == kind
