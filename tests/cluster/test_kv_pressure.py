"""Models give KV back when their nodes lose room, get it again with the room, and leave nodes that leave."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from azu.cluster.scaling import KvPressure
from azu.planner.kv_blocks import with_blocks
from azu.planner.policy import PlanPolicy
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import Structure
from azu.protocol.topology import Topology
from azu.units import MIB
from tests.builders import node, structure, topology

POLICY = PlanPolicy(promised_sequences=4, tokens_per_sequence=64, block_size=16)  # 16 blocks, 4 of them kept
BLOCK = 16 * 1024  # bytes in one layer


@dataclass
class Model:
    """A model that does at once what it is told."""

    structure: Structure = field(default_factory=lambda: structure(4))
    topology: Topology = field(
        default_factory=lambda: topology({"a": (0, 2), "b": (2, 4)}, vram_bytes=4 * MIB)
    )
    sizes: list[int] = field(default_factory=list)

    async def resize(self, num_blocks: int) -> None:
        self.sizes.append(num_blocks)
        self.topology = with_blocks(self.structure, self.topology, num_blocks)


@dataclass
class Cluster:
    """As much of a cluster as KvPressure uses."""

    deployments: tuple[Model, ...]
    vacated: list[str] = field(default_factory=list)
    promised: dict[str, int] = field(default_factory=dict)

    def promised_bytes(self) -> dict[str, int]:
        return self.promised

    async def vacate(self, node_id: str, *, closes_idle: bool) -> bool:
        self.vacated.append(node_id)
        self.closes_idle = closes_idle
        return True


def reports(a_bytes: int = 4 * MIB, **given: object) -> list[Node]:
    return [node("a", a_bytes, **given), node("b", 4 * MIB)]


def checked(*checks: tuple[float, list[Node]], promised: dict[str, int] | None = None) -> Cluster:
    cluster = Cluster((Model(),), promised=promised or {})
    pressure = KvPressure(cluster, POLICY)

    async def check_all() -> None:
        for now_s, reported in checks:
            await pressure.check(reported, now_s)

    asyncio.run(check_all())
    return cluster


def test_a_model_gives_back_what_its_node_lost_and_gets_it_again() -> None:
    less = reports(4 * MIB - 6 * 2 * BLOCK)

    cluster = checked((0.0, reports()), (1.0, less), (10.0, less), (20.0, reports()), (30.0, reports()))

    assert cluster.deployments[0].sizes == [10, 16]
    assert cluster.vacated == []


def test_room_that_is_promised_to_others_is_no_room_for_more_kv() -> None:
    less = reports(4 * MIB - 6 * 2 * BLOCK)

    cluster = checked((0.0, less), (10.0, reports()), promised={"a": 6 * 2 * BLOCK})

    assert cluster.deployments[0].sizes == [10]


def test_room_that_wavers_moves_nothing_for_a_while() -> None:
    low, lower = reports(4 * MIB - 2 * 2 * BLOCK), reports(4 * MIB - 8 * 2 * BLOCK)

    cluster = checked((0.0, low), (1.0, lower), (2.0, reports()), (3.0, lower), (6.0, lower))

    assert cluster.deployments[0].sizes == [14, 8]


def test_what_no_kv_gives_back_leaves_the_node() -> None:
    cluster = checked((0.0, reports(2 * MIB)), (10.0, reports(2 * MIB)))

    assert cluster.deployments[0].sizes == [4]
    assert set(cluster.vacated) == {"a"}


@pytest.mark.parametrize("state", [NodeState.LEAVING, NodeState.PAUSED, NodeState.SUSPECT])
def test_a_node_that_leaves_is_emptied_and_asked_again_only_after_a_while(state: NodeState) -> None:
    leaving = [replace(one, state=state) if one.node_id == "a" else one for one in reports()]

    cluster = checked((0.0, leaving), (1.0, leaving), (6.0, leaving))

    assert cluster.vacated == ["a", "a"]
    assert cluster.closes_idle == (state is not NodeState.SUSPECT), "its owner wants the device back"
    assert cluster.deployments[0].sizes == []


def test_what_was_left_alone_long_ago_is_forgotten() -> None:
    pressure = KvPressure(Cluster((Model(),)), POLICY)

    async def check_all() -> None:
        for second in range(20):
            left = replace(node(f"node-{second}"), state=NodeState.LEAVING)
            await pressure.check([*reports(), left], float(second))

    asyncio.run(check_all())
    assert set(pressure._alone_until_s) == {f"node-{second}" for second in range(15, 20)}
