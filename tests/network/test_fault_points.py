"""The fault run strikes every public method of every actor and of the books."""

import importlib
import inspect

import pytest

from azu.money.bookkeeping import Bookkeeper
from tests.actors.test_links import ACTORS
from tests.network.test_fault_run import BOOKS, POINTS


@pytest.mark.parametrize("actor", ACTORS)
def test_every_public_method_of_an_actor_is_struck(actor: type) -> None:
    struck = {point.method for point in POINTS}
    methods = [name for name, one in vars(actor).items() if inspect.isfunction(one) and name[0] != "_"]

    assert [name for name in methods if f"{actor.__module__}:{actor.__name__}.{name}" not in struck] == []


def test_every_public_method_of_the_books_is_struck() -> None:
    struck = {point.method for point in POINTS}
    methods = [name for name, one in vars(Bookkeeper).items() if inspect.isfunction(one) and name[0] != "_"]
    # The end of the process, its start, and what it does once an hour.
    apart = {"close", "note_successions", "drop_unfunded_keys"}

    assert [name for name in methods if f"{BOOKS}.{name}" not in struck and name not in apart] == []


@pytest.mark.parametrize("method", sorted(point.method for point in POINTS))
def test_every_point_is_a_method_that_there_is(method: str) -> None:
    module, _, name = method.partition(":")
    kind, _, method = name.partition(".")
    assert method in vars(getattr(importlib.import_module(module), kind))


def test_there_are_at_least_sixty_points() -> None:
    assert len({point.method for point in POINTS}) == len(POINTS) >= 60
