"""What Ray does not end at once of a deployment is ended later, and nothing of it is forgotten."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray

from actors.deployment import RayBackend
from actors.node import NodeAgents
from azu.cluster.nodes import NodeTable
from azu.config.network import load_network
from azu.errors import InsufficientCapacity, InternalError
from azu.protocol.topology import LayerSpan, Stage
from tests.cluster.waiting import until

POLICY = load_network().policy
PIECE = Stage(0, "node-a", LayerSpan(0, 1), {}, vram_bytes=1)


@dataclass
class Cluster:
    """What the backend takes from Ray: each end is noted, and as many as `refusals` says are refused."""

    refusals: Counter[str] = field(default_factory=Counter)
    is_granted: Callable[[], bool] = lambda: True
    ended: list[str] = field(default_factory=list)

    def end(self, name: str) -> None:
        if self.refusals[name]:
            self.refusals[name] -= 1
            raise ConnectionError("Ray's control service is away")
        self.ended.append(name)

    async def granted(self, group: str, timeout_s: float) -> bool:
        return self.is_granted()


def run(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, scenario: Callable[[RayBackend], Awaitable[None]]
) -> None:
    monkeypatch.setattr(ray, "kill", cluster.end)
    monkeypatch.setattr("actors.placement.remove_placement_group", cluster.end)
    monkeypatch.setattr("actors.deployment.reserve", lambda name, *_: f"group of {name}")
    monkeypatch.setattr("actors.deployment.granted", cluster.granted)
    monkeypatch.setattr("actors.deployment.start_in_group", lambda _, name, *__: name)
    monkeypatch.setattr("actors.deployment._RELEASE_EVERY_S", 0.001)

    async def within() -> None:
        agents = NodeAgents(POLICY.heartbeat, Path(), NodeTable(suspect_s=1.0, dead_s=1.0))
        backend = RayBackend(POLICY, "", agents, lambda _: None, lambda *_: None)
        async with asyncio.timeout(20):
            await scenario(backend)

    asyncio.run(within())


def test_a_kill_that_ray_does_not_take_holds_up_no_other_and_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(Counter({"one": 3, "group of two": 1}))

    async def scenario(backend: RayBackend) -> None:
        for name in ("one", "two"):
            await backend.start(name, PIECE)
        for name in ("one", "two"):
            backend.kill(name)
        assert cluster.ended == ["group of one", "two"], "an actor and its room are given back apart"
        await until(lambda: {"one", "group of two"} <= set(cluster.ended))

    run(monkeypatch, cluster, scenario)


def _raises(error: BaseException) -> bool:
    raise error


@pytest.mark.parametrize(
    ("is_granted", "raised"),
    [
        (lambda: False, InsufficientCapacity),
        (lambda: _raises(ConnectionError()), InternalError),
        (lambda: _raises(asyncio.CancelledError()), asyncio.CancelledError),
    ],
)
def test_what_was_reserved_for_a_piece_that_does_not_start_is_given_back(
    monkeypatch: pytest.MonkeyPatch, is_granted: Callable[[], bool], raised: type[BaseException]
) -> None:
    cluster = Cluster(Counter({"group of one": 1}), is_granted)

    async def scenario(backend: RayBackend) -> None:
        with pytest.raises(raised):
            await backend.start("one", PIECE)
        await until(lambda: cluster.ended == ["group of one"])

    run(monkeypatch, cluster, scenario)
