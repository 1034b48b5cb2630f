"""A model that stays busy gets another pipeline, and only then."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from azu.cluster.scaling import ScaleOut
from azu.protocol.topology import Topology
from tests.builders import OwnPipeline, topology

PROMISED = 4
IDLE_S = 60.0


@dataclass
class Pipeline(OwnPipeline):
    """A pipeline with so many jobs."""

    num_expected: int
    replica: int = 0
    broken: bool = False

    @property
    def is_idle(self) -> bool:
        return not self.num_expected

    @property
    def topology(self) -> Topology:
        return replace(topology({"a": (0, 4)}), replica=self.replica)


@dataclass
class Network:
    """Pipelines of one model, and the models that got another one."""

    deployments: tuple[Pipeline, ...] = ()
    added: list[str] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)

    async def close_further(self, deployment: Pipeline) -> None:
        self.closed.append(deployment.replica)

    async def add_pipeline(self, model_id: str, revision: str) -> None:
        self.added.append(model_id)


def added_in(*each: tuple[Pipeline, ...]) -> int:
    """Return how often a model got another pipeline in checks of these pipelines."""
    network = Network()
    scale_out = ScaleOut(network, PROMISED, IDLE_S, clock=lambda: 0.0)
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


def test_a_pipeline_leaves_that_was_idle_for_a_while_the_newest_first() -> None:
    network, clock = Network(), [0.0]
    scale_out = ScaleOut(network, PROMISED, IDLE_S, clock=lambda: clock[0])
    closed = []
    for now_s, jobs in ((0.0, 0), (50.0, 0), (55.0, 1), (60.0, 0), (119.0, 0), (120.0, 0)):
        clock[0] = now_s
        network.closed.clear()
        network.deployments = (Pipeline(1, 0), Pipeline(0, 1), Pipeline(jobs, 2))
        asyncio.run(scale_out.check())
        closed.append(list(network.closed))

    assert closed == [[], [], [], [1], [1], [2, 1]]
