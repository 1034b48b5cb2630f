"""More room is requested while jobs lack it, on top of what there is, and no longer."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from azu.cluster.cluster import Shortage
from azu.cluster.scaling import NodeRequest
from azu.errors import Unavailable
from azu.units import MIB


@dataclass
class Network:
    """Models that found no room, a clock, and what was requested."""

    missing: dict[str, tuple[int, ...]]
    now_s: float = 0.0
    requests: list[tuple[int, ...]] = field(default_factory=list)
    is_deaf: bool = False

    def __post_init__(self) -> None:
        self.shortages = {model_id: Shortage(sizes, 0.0) for model_id, sizes in self.missing.items()}
        self.node_request = NodeRequest(self, self.request, patience_s=30, clock=lambda: self.now_s)

    async def request(self, bundles: tuple[int, ...]) -> None:
        if self.is_deaf:
            raise Unavailable("the request was not taken")
        self.requests.append(bundles)

    def check(self, *lent_mib: int, waiting: int = 1) -> None:
        asyncio.run(self.node_request.check([mib * MIB for mib in lent_mib], waiting))


def test_what_is_missing_comes_on_top_of_what_there_is_in_whole_mib() -> None:
    network = Network({"m/one": (5 * MIB + 1, 3 * MIB), "m/two": (4 * MIB,)})
    network.check(8, 7)

    assert network.requests == [(7, 8, 3, 4, 6)]


def test_the_same_is_requested_once_and_again_when_a_node_came() -> None:
    network = Network({"m/one": (9 * MIB,)})
    network.check(7)
    network.check(7)
    network.check(7, 16)

    assert network.requests == [(7, 9), (7, 16, 9)]


def no_job_waits(network: Network) -> None:
    network.check(7, waiting=0)


def the_model_is_deployed(network: Network) -> None:
    network.shortages.clear()
    network.check(7)


def it_is_not_tried_again(network: Network) -> None:
    network.now_s = 31.0
    network.check(7)


@pytest.mark.parametrize("event", [no_job_waits, the_model_is_deployed, it_is_not_tried_again])
def test_a_request_is_withdrawn_once(event: Callable[[Network], None]) -> None:
    network = Network({"m/one": (9 * MIB,)})
    network.check(7)
    event(network)
    event(network)

    assert network.requests == [(7, 9), ()]
    assert network.shortages == {}


def test_a_request_of_an_earlier_scheduler_is_withdrawn() -> None:
    network = Network({})
    network.check(7, waiting=0)

    assert network.requests == [()]


def test_a_request_that_is_not_taken_is_made_again_and_nothing_fails() -> None:
    network = Network({"m/one": (9 * MIB,)}, is_deaf=True)
    network.check(7)
    network.is_deaf = False
    network.check(7)

    assert network.requests == [(7, 9)]


def test_a_shortage_without_sizes_requests_nothing() -> None:
    network = Network({"m/one": ()})
    network.check(7)

    assert network.requests == [()]
