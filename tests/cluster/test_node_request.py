"""More room is asked for while jobs lack it, beside what there is, and no longer."""

import asyncio
from dataclasses import dataclass, field

import pytest

from azu.cluster.scaling import NodeRequest
from azu.errors import InsufficientCapacity, Unavailable
from azu.units import MIB


@dataclass
class Network:
    """Models that find no room, a clock, and what was asked for."""

    short_of: dict[str, tuple[int, ...]]
    now_s: float = 0.0
    requests: list[tuple[int, ...]] = field(default_factory=list)
    deaf: bool = False

    def __post_init__(self) -> None:
        self.growth = NodeRequest(self, self.ask, patience_s=30, clock=lambda: self.now_s)

    async def ensure(self, model_id: str, revision: str, job_id: str) -> object:
        if (missing := self.short_of.get(model_id)) is None:
            return model_id
        raise InsufficientCapacity("too large", missing_bytes=missing)

    async def ask(self, bundles: tuple[int, ...]) -> None:
        if self.deaf:
            raise Unavailable("nobody listens")
        self.requests.append(bundles)

    def try_all(self) -> None:
        for model in list(self.short_of):
            with pytest.raises(InsufficientCapacity):
                asyncio.run(self.growth.ensure(model, "r1", "job-1"))

    def look(self, *lent_mib: int, waiting: int = 1) -> None:
        asyncio.run(self.growth.look([mib * MIB for mib in lent_mib], waiting))


def test_what_is_missing_comes_on_top_of_what_there_is_in_whole_mib() -> None:
    network = Network({"m/one": (5 * MIB + 1, 3 * MIB), "m/two": (4 * MIB,)})
    network.try_all()
    network.look(8, 7)

    assert network.requests == [(7, 8, 3, 4, 6)]


def test_the_same_is_asked_for_once_and_again_when_a_node_came() -> None:
    network = Network({"m/one": (9 * MIB,)})
    network.try_all()
    network.look(7)
    network.look(7)
    network.look(7, 16)

    assert network.requests == [(7, 9), (7, 16, 9)]


def nothing_waits(network: Network) -> None:
    network.look(7, waiting=0)


def it_fits(network: Network) -> None:
    network.short_of.clear()
    assert asyncio.run(network.growth.ensure("m/one", "r1", "job-1")) == "m/one"
    network.look(7)


def nobody_tries_it_again(network: Network) -> None:
    network.now_s = 31.0
    network.look(7)


@pytest.mark.parametrize("happens", [nothing_waits, it_fits, nobody_tries_it_again])
def test_it_is_withdrawn_once(happens) -> None:
    network = Network({"m/one": (9 * MIB,)})
    network.try_all()
    network.look(7)
    happens(network)
    happens(network)

    assert network.requests == [(7, 9), ()]


def test_a_request_of_an_earlier_scheduler_is_withdrawn() -> None:
    network = Network({})
    network.look(7, waiting=0)

    assert network.requests == [()]


def test_where_nobody_listens_nothing_fails_and_it_is_asked_again() -> None:
    network = Network({"m/one": (9 * MIB,)}, deaf=True)
    network.try_all()
    network.look(7)
    network.deaf = False
    network.look(7)

    assert network.requests == [(7, 9)]


def test_an_error_without_numbers_asks_for_nothing() -> None:
    network = Network({"m/one": ()})
    network.try_all()
    network.look(7)

    assert network.requests == [()]
