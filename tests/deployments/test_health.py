"""What is told of a scheduler or books that do not answer, or answer with a fault: at once, and in words."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from actors.placement import SCHEDULER
from azu.errors import InternalError, Unavailable
from azu.money.bookkeeping import Bookkeeper
from tests.deployments.local import LocalIngress, NoNodes, play_as_user

# A second, and what a busy machine adds.
TOLD_S = 2.0


class Silent(NoNodes):
    """A scheduler that is frozen."""

    async def ready(self) -> bool:
        await asyncio.sleep(60)
        raise AssertionError("the call was not cancelled")

    problems = nodes = deployments = metrics = ready  # type: ignore[assignment]


class NotUp(NoNodes):
    """A scheduler that died, or does not start."""

    async def ready(self) -> bool:
        raise Unavailable("the scheduler is not up")

    problems = nodes = deployments = metrics = ready  # type: ignore[assignment]


class Faulty(NoNodes):
    """A scheduler in which something goes wrong."""

    async def ready(self) -> bool:
        raise InternalError("azu made a mistake")


@pytest.mark.parametrize("scheduler", [Silent(), NotUp(), Faulty()], ids=lambda one: type(one).__name__)
def test_the_health_is_told_within_a_second_and_names_the_scheduler(
    redis_url: str, tmp_path: Path, scheduler: NoNodes
) -> None:
    async def scenario(ingress: LocalIngress, client: httpx.AsyncClient) -> None:
        actors = ingress.app.state.services._actors
        usual, actors[SCHEDULER] = actors[SCHEDULER], scheduler
        began_s = time.monotonic()
        health = await client.get("/health")
        told_s = time.monotonic() - began_s
        actors[SCHEDULER] = usual

        assert health.status_code == 503
        assert health.json()["status"] == "starting"
        (problem,) = health.json()["problems"]
        assert problem.startswith("the scheduler is away since")
        assert told_s < TOLD_S, told_s
        assert (await client.get("/health")).json() == {"status": "ok", "problems": []}

    play_as_user(redis_url, tmp_path, scenario)


def test_of_a_scheduler_that_is_away_for_long_the_health_says_why(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ingress: LocalIngress, client: httpx.AsyncClient) -> None:
        services = ingress.app.state.services
        services._actors[SCHEDULER] = NotUp()
        await client.get("/health")
        services._scheduler._away_since_s -= 61

        (problem,) = (await client.get("/health")).json()["problems"]
        assert problem == "the scheduler is away since 61 s: the scheduler is not up"

    play_as_user(redis_url, tmp_path, scenario)


@pytest.mark.parametrize(
    "error", [Unavailable("Redis did not answer"), ZeroDivisionError()], ids=["away", "a fault"]
)
def test_the_health_names_the_books_whose_answer_is_an_error(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fails(_: object) -> int:
        raise error

    async def scenario(_: LocalIngress, client: httpx.AsyncClient) -> None:
        with monkeypatch.context() as failing:
            failing.setattr(Bookkeeper, "findings", fails)
            health = await client.get("/health")

        assert health.status_code == 503
        (problem,) = health.json()["problems"]
        assert problem.startswith("the books cannot go on: ")
        assert (await client.get("/health")).json() == {"status": "ok", "problems": []}

    play_as_user(redis_url, tmp_path, scenario)
