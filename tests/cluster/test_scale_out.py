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
    """Pipelines of one model, and the models that got another one."""

    deployments: tuple[Pipeline, ...] = ()
    added: list[str] = field(default_factory=list)

    async def add_pipeline(self, model_id: str, revision: str) -> None:
        self.added.append(model_id)


def added_in(*each: tuple[Pipeline, ...]) -> int:
    """Return how often a model got another pipeline in checks of these pipelines."""
    network = Network()
    scale_out = ScaleOut(network, PROMISED)
    for pipelines in each:
        network.deployments = pipelines
        asyncio.run(scale_out.check())
    return len(network.added)


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
def test_a_model_busy_twice_gets_another_pipeline(each: list[tuple[Pipeline, ...]], times: int) -> None:
    assert added_in(*each) == times
