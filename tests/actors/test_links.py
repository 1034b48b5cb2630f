"""What crosses an actor's boundary is an AzuError with a code."""

import asyncio
import inspect

import pytest

from actors.expert import ExpertActor
from actors.layer import LayerActor
from actors.links import raises_known_errors
from actors.node import NodeAgent
from actors.pipeline import Pipeline
from actors.registry import Registry
from actors.scheduler import Scheduler
from azu.errors import InternalError, InvalidRequest
from tests.logged import logged

ACTORS = (ExpertActor, LayerActor, NodeAgent, Pipeline, Registry, Scheduler)


@raises_known_errors
class Odd:
    """An actor whose calls fail as they are told."""

    def call(self, error: Exception) -> None:
        raise error

    async def wait(self, error: Exception) -> None:
        raise error


@pytest.mark.parametrize("method", ["call", "wait"])
def test_an_unknown_exception_reaches_the_caller_as_an_id_that_the_log_has(method: str) -> None:
    with logged() as lines, pytest.raises(InternalError) as caught:
        answer(method, ZeroDivisionError("division by zero"))

    assert caught.value.code == "internal_error"
    assert caught.value.__cause__ is None
    assert "ZeroDivisionError" not in caught.value.message
    assert lines()[0]["fault_id"] in caught.value.message
    assert lines()[0]["message"] == f"Odd.{method} failed"


@pytest.mark.parametrize("method", ["call", "wait"])
def test_what_azu_raises_on_purpose_stays_as_it_is(method: str) -> None:
    error = InvalidRequest("too long")
    with pytest.raises(InvalidRequest) as caught:
        answer(method, error)

    assert caught.value is error


@pytest.mark.parametrize("actor", ACTORS)
def test_every_public_method_of_every_actor_does_so(actor: type) -> None:
    methods = {name: one for name, one in vars(actor).items() if inspect.isfunction(one) and name[0] != "_"}

    assert methods
    assert [name for name, one in methods.items() if not hasattr(one, "__wrapped__")] == []


def answer(method: str, error: Exception) -> None:
    found = getattr(Odd(), method)(error)
    if inspect.isawaitable(found):
        asyncio.run(wait_for(found))


async def wait_for(found: object) -> None:
    assert inspect.isawaitable(found)
    await found
