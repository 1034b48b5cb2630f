"""A model that stays busy gets another pipeline, and only then."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from azu.cluster.scaling import ScaleOut
from azu.protocol.topology import Topology
from tests.builders import topology

PROMISED = 4


@dataclass
class Pipeline:
    """A pipeline with so many jobs."""

    running_jobs: int
    replica: int = 0
    broken: bool = False

    @property
    def topology(self) -> Topology:
        return replace(topology({"a": (0, 4)}), replica=self.replica)


@dataclass
class Network:
    """Pipelines of one model, and how often it was widened."""

    deployments: tuple[Pipeline, ...] = ()
    widened: list[str] = field(default_factory=list)

    async def add_pipeline(self, model_id: str, revision: str) -> None:
        self.widened.append(model_id)


def looks(*each: tuple[Pipeline, ...]) -> int:
    """Return how often a model was widened in looks at these pipelines."""
    network = Network()
    widening = ScaleOut(network, PROMISED)
    for pipelines in each:
        network.deployments = pipelines
        asyncio.run(widening.check())
    return len(network.widened)


BUSY, CALM = (Pipeline(PROMISED + 1),), (Pipeline(PROMISED),)


@pytest.mark.parametrize(
    ("each", "times"),
    [
        ([BUSY], 0),
        ([BUSY, BUSY], 1),
        ([BUSY, CALM, BUSY], 0),
        ([CALM, CALM, CALM], 0),
        ([BUSY, (*BUSY, Pipeline(0, 1)), (*BUSY, Pipeline(1, 1))], 0),
        ([(*BUSY, Pipeline(9, 1)), (*BUSY, Pipeline(9, 1))], 1),
        ([(*BUSY, Pipeline(0, 1, broken=True)), (*BUSY, Pipeline(0, 1, broken=True))], 1),
        ([(), ()], 0),
    ],
)
def test_who_is_busy_twice_is_widened(each: list[tuple[Pipeline, ...]], times: int) -> None:
    assert looks(*each) == times
