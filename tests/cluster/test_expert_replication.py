"""Replicas follow what is chosen, and go while jobs find no room."""

import asyncio
from dataclasses import dataclass, field, replace

from azu.cluster.cluster import Shortage
from azu.cluster.scaling import Cooldown, ExpertReplication
from azu.planner.replicas import ExpertCounts, ExpertHeat
from azu.protocol.topology import ExpertSet, Topology
from tests.builders import topology

REST_S = 60.0
APART = ExpertSet(0, "b", {1: (0, 1)}, 1)


@dataclass
class Model:
    """A model with experts apart, which says how often they were chosen."""

    topology: Topology = field(default_factory=lambda: replace(topology({"a": (0, 4)}), expert_sets=(APART,)))
    broken: bool = False
    counts: ExpertCounts = field(default_factory=lambda: {1: (0, 0)})

    async def num_chosen(self) -> ExpertCounts:
        return self.counts


@dataclass
class Network:
    """One model, a clock, and the heat for which it was to have replicas."""

    model: Model = field(default_factory=Model)
    now_s: float = 0.0
    asked: list[ExpertHeat] = field(default_factory=list)
    changes: bool = False

    def __post_init__(self) -> None:
        self.deployments = (self.model,)
        rest = Cooldown(REST_S, clock=lambda: self.now_s)
        self.replication = ExpertReplication(self, rest, least_choices=10)

    async def replicate(self, model: Model, heat: ExpertHeat) -> bool:
        self.asked.append(heat)
        return self.changes

    def check(self, at_s: float, counts: tuple[int, int] = (0, 0), *, is_short: bool = False) -> None:
        self.now_s, self.model.counts = at_s, {1: counts}
        self.shortages = {"m/other": Shortage((1,), at_s)} if is_short else {}
        asyncio.run(self.replication.check())


def heat(*each: float) -> ExpertHeat:
    return {(1, expert): one for expert, one in enumerate(each)}


def test_a_model_is_judged_by_the_choices_since_the_last_judgement() -> None:
    network = Network()
    network.check(0, (30, 10))
    assert network.asked == []  # it rests

    network.check(60, (30, 10))
    network.check(65, (32, 12))  # too few to tell
    network.check(70, (32, 20))
    assert network.asked == [heat(1.5, 0.5), heat(2 * 2 / 12, 2 * 10 / 12)]


def test_a_model_that_got_replicas_rests() -> None:
    network = Network(changes=True)
    for at_s in range(0, 190, 10):
        network.check(at_s, (at_s, at_s))

    assert len(network.asked) == 3


def test_replicas_are_given_back_at_once_while_jobs_find_no_room() -> None:
    network = Network()
    network.check(0, (30, 10), is_short=True)

    assert network.asked == [{}]


def test_broken_models_and_those_with_all_experts_beside_their_routers_get_no_replicas() -> None:
    whole = Model()
    whole.topology = replace(whole.topology, expert_sets=())
    for model in (Model(broken=True), whole):
        network = Network(model=model)
        network.check(0, (30, 10))
        network.check(60, (30, 10), is_short=False)
        assert network.asked == []


def test_the_choices_of_a_model_that_went_are_forgotten() -> None:
    network = Network()
    network.check(0)
    network.check(60, (30, 10))
    assert network.replication._counts
    network.deployments = ()
    network.check(70)

    assert not network.replication._counts
