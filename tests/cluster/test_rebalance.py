"""Models move to better places now and then, and rest after every change."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from azu.cluster import scaling
from azu.cluster.scaling import Cooldown, Rebalance, ShareOut
from azu.protocol.topology import Topology
from tests.builders import topology

REST_S = 60.0


@dataclass
class Model:
    """A model that moves when it is asked to."""

    topology: Topology = field(default_factory=lambda: topology({"a": (0, 4)}))
    broken: bool = False

    def change(self) -> None:
        self.topology = replace(self.topology, epoch=self.topology.epoch + 1)


@dataclass
class Network:
    """One model, a clock, and when it was tried to move."""

    gains: bool = True
    works: bool = True
    model: Model = field(default_factory=Model)
    now_s: float = 0.0
    tried_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.deployments = (self.model,)
        self.rebalance = Rebalance(self, Cooldown(REST_S, clock=lambda: self.now_s))

    async def improve(self, model: Model) -> bool:
        self.tried_s.append(self.now_s)
        if self.gains and self.works:
            model.change()
        return self.gains

    def check_until(self, end_s: float, every_s: float = 10.0) -> None:
        while self.now_s <= end_s:
            asyncio.run(self.rebalance.check())
            self.now_s += every_s


def test_a_model_that_came_up_rests_before_it_is_moved() -> None:
    network = Network(gains=False)
    network.check_until(90)

    assert network.tried_s == [60, 70, 80, 90]


@pytest.mark.parametrize("works", [True, False])
def test_a_model_moves_once_per_rest_however_often_another_place_is_better(works: bool) -> None:
    network = Network(works=works)
    network.check_until(250)

    assert network.tried_s == [60, 120, 180, 240]


def test_a_model_that_was_repaired_rests_as_well() -> None:
    network = Network(gains=False)
    network.check_until(50)
    network.model.change()
    network.check_until(120)

    assert network.tried_s == [120]


def test_a_broken_model_does_not_move() -> None:
    network = Network(model=Model(broken=True))
    network.check_until(200)

    assert network.tried_s == []


def test_a_model_is_looked_at_once_in_each_time_whether_it_moves_to_other_owners_or_not() -> None:
    model, looked_s, now_s = Model(), [], 0.0

    @dataclass
    class Shared:
        deployments = (model, Model(broken=True, topology=topology({"b": (0, 4)})))

        async def share_out(self, deployment: Model) -> bool:
            looked_s.append(now_s)
            deployment.change()
            return True

    share_out = ShareOut(Shared(), 100.0, clock=lambda: now_s)
    while now_s <= 250:
        asyncio.run(share_out.check())
        now_s += 10

    assert looked_s == [100, 200]


def test_the_latest_deployments_that_rest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_MOST_SEEN", 2)
    rest = Cooldown(REST_S, clock=lambda: 0.0)
    models = [Model() for _ in range(3)]
    for number, model in enumerate(models):
        model.topology = replace(model.topology, replica=number)
        rest.begin(model)

    assert list(rest._seen) == [model.topology.key for model in models[1:]]
