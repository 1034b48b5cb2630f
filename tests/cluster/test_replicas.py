"""The fleet has hot experts held twice where nobody needs the room."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from azu.cluster.cluster import Cluster
from azu.protocol.structure import Structure
from azu.units import MIB
from tests.builders import node, structure
from tests.cluster.test_cluster import CountingBuilder, StandingModel, fleet
from tests.planner.test_plan import POLICY

HOT = {(0, 7): 9.0}


@dataclass
class MoeBuilder(CountingBuilder):
    """A model with one layer of eight experts, or a dense one of `num_layers`."""

    async def structure(self, model_id: str, revision: str) -> Structure:
        if model_id == "m/dense":
            return structure(self.num_layers, model_id=model_id)
        return structure(1, moe_layers={0: 8}, model_id=model_id)


@pytest.fixture
def play(redis_url: str) -> Callable[..., None]:
    """Run a scenario on a model whose router is on "r" and whose last two experts are on "a"."""

    def run(
        scenario: Callable[[Cluster, StandingModel, MoeBuilder], Awaitable[None]], **sizes_mib: int
    ) -> None:
        async def scene() -> None:
            models, builder = fleet(redis_url, builder=MoeBuilder(), policy=POLICY)
            builder.nodes = [node("r", 10 * MIB, memory_bytes_per_s=1e12)]
            builder.nodes += [node(name, mib * MIB) for name, mib in sizes_mib.items()]
            model = await models.ensure("m/moe", "r1", "job-1")
            assert places(model) == ["a"]
            await scenario(models, model, builder)

        asyncio.run(scene())

    return run


def places(model: StandingModel) -> list[str]:
    """Return where the sets of experts are."""
    return [chosen.node_id for chosen in model.topology.expert_sets]


def test_a_hot_expert_gets_a_replica_beside_what_runs_and_loses_it_when_it_is_cold(play) -> None:
    async def scenario(models: Cluster, model: StandingModel, builder: MoeBuilder) -> None:
        builder.nodes.append(node("c", 20 * MIB))
        before = model.topology
        assert not await models.replicate(model, {})
        assert await models.replicate(model, HOT)
        assert places(model) == ["a", "b"]
        assert not await models.replicate(model, HOT), "it has what it wants"
        assert models.placed_bytes() == model.topology.vram_bytes_by_node

        assert await models.replicate(model, {(0, 0): 9.0})
        assert model.topology.expert_sets == before.expert_sets
        assert model.topology.epoch > before.epoch
        (given, was_beside), (taken, _) = builder.moves
        assert was_beside
        assert not given.gone
        assert given.fresh == taken.gone
        assert not taken.fresh

    play(scenario, a=4, b=8)


def test_the_room_for_what_a_node_may_lose_is_not_taken(play) -> None:
    async def scenario(models: Cluster, model: StandingModel, builder: MoeBuilder) -> None:
        assert not await models.replicate(model, HOT), "if a is lost its experts need b"
        builder.nodes.append(node("c", 20 * MIB))
        assert await models.replicate(model, HOT)
        assert places(model) == ["a", "b"]
        del builder.nodes[-1]
        assert await models.replicate(model, HOT), "now they need b again"
        assert places(model) == ["a"]

    play(scenario, a=4, b=4)
