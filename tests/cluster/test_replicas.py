"""Hot experts are held twice where no model needs the room."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from azu.cluster.deployment import Deployment
from azu.units import MIB
from tests.builders import node, structure
from tests.cluster.test_cluster import Network
from tests.planner.test_plan import POLICY

HOT = {(0, 7): 9.0}


@pytest.fixture
def play(redis_url: str) -> Callable[..., None]:
    """Run a scenario on a model whose router is on "r" and whose last two experts are on "a"."""

    def run(scenario: Callable[[Network, Deployment], Awaitable[None]], **sizes_mib: int) -> None:
        async def scene() -> None:
            nodes = [node("r", 10 * MIB, memory_bytes_per_s=1e12)]
            nodes += [node(name, mib * MIB) for name, mib in sizes_mib.items()]
            network = Network(redis_url, nodes=nodes, policy=POLICY)
            network.backend.structures["m/moe"] = structure(1, moe_layers={0: 8}, model_id="m/moe")
            deployment = await network.ensure("m/moe")
            assert places(deployment) == ["a"]
            await scenario(network, deployment)

        asyncio.run(scene())

    return run


def places(deployment: Deployment) -> list[str]:
    """Return where the sets of experts are."""
    return [chosen.node_id for chosen in deployment.topology.expert_sets]


def test_a_hot_expert_gets_a_replica_beside_what_runs_and_loses_it_when_it_is_cold(play) -> None:
    async def scenario(network: Network, deployment: Deployment) -> None:
        network.nodes.append(node("c", 20 * MIB))
        before, cluster = deployment.topology, network.cluster
        assert not await cluster.replicate(deployment, {})
        running = set(network.backend.pieces)
        assert await cluster.replicate(deployment, HOT)
        assert places(deployment) == ["a", "b"]
        assert running < network.backend.pieces.keys(), "nothing that ran went"
        assert not await cluster.replicate(deployment, HOT), "it has its replica"
        assert cluster.placed_bytes() == deployment.topology.vram_bytes_by_node

        assert await cluster.replicate(deployment, {(0, 0): 9.0})
        assert deployment.topology.expert_sets == before.expert_sets
        assert deployment.topology.epoch > before.epoch
        assert set(network.backend.pieces) == running

    play(scenario, a=4, b=8)


def test_the_room_for_what_a_node_may_lose_is_not_taken(play) -> None:
    async def scenario(network: Network, deployment: Deployment) -> None:
        cluster = network.cluster
        assert not await cluster.replicate(deployment, HOT), "if a is lost its experts need b"
        network.nodes.append(node("c", 20 * MIB))
        assert await cluster.replicate(deployment, HOT)
        assert places(deployment) == ["a", "b"]
        del network.nodes[-1]
        assert await cluster.replicate(deployment, HOT), "now they need b again"
        assert places(deployment) == ["a"]

    play(scenario, a=4, b=4)
