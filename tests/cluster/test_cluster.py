"""Models are deployed when a job needs them, once, and idle ones make room."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from azu.cluster.cluster import Cluster
from azu.cluster.deployment import Deployment, DeploymentState
from azu.cluster.deployment_store import DeploymentStore
from azu.errors import DeadlineExceeded, InsufficientCapacity, Unavailable, WorkerLost
from azu.models.status import ModelState, ModelStatus
from azu.planner.migration import TopologyChange, better_placement
from azu.planner.plan import plan
from azu.planner.policy import PlanPolicy
from azu.protocol.job import FinishReason
from azu.protocol.node import Node, NodeState
from azu.protocol.step import PieceProgress, PieceState
from azu.protocol.structure import Structure
from azu.protocol.topology import PieceSet, Topology
from azu.units import MIB
from tests.actors.fake_backend import FakeBackend
from tests.builders import node, structure
from tests.cluster.waiting import (
    end_other_tasks,
    failing_once,
    supervisor_at_once,
    turns_at_once,
    until,
)

POLICY = PlanPolicy(promised_sequences=2, tokens_per_sequence=128)


@dataclass
class Network:
    """A cluster over a backend without Ray, and nodes whose room the test chooses."""

    redis_url: str
    vram_bytes: int = 64 * MIB
    policy: PlanPolicy = POLICY
    nodes_come: bool = False
    room_wait_s: float = 0.1
    backend: FakeBackend = field(default_factory=FakeBackend)
    nodes: list[Node] = field(default_factory=list)
    now_s: float = 0.0
    leaving: str | None = None  # a node that takes nothing new
    rates: dict[str, float] = field(default_factory=dict)  # what owners earned

    def __post_init__(self) -> None:
        self.nodes = self.nodes or [node("a", self.vram_bytes), node("b", self.vram_bytes)]
        self.store = DeploymentStore.from_url(self.redis_url)
        self.cluster = self.new_cluster()

    def new_cluster(self) -> Cluster:
        """Return a cluster that knows nothing but the store and the backend, as the next scheduler's."""
        return Cluster(
            self.backend, self.room, self.policy, self.store, room_wait_s=self.room_wait_s,
            nodes_come=self.nodes_come, clock=lambda: self.now_s, turns=turns_at_once,
            rates=lambda _: self.rates,
        )  # fmt: skip

    def room(self, placed: Mapping[str, int], given_back: Mapping[str, int]) -> list[Node]:
        self.backend.nodes = {one.node_id: one for one in self.nodes}
        free = {one.node_id: one.vram_total_bytes - placed.get(one.node_id, 0) for one in self.nodes}
        return [
            replace(
                one,
                vram_free_bytes=max(0, free[one.node_id]),
                state=NodeState.LEAVING if one.node_id == self.leaving else one.state,
            )
            for one in self.nodes
        ]

    async def ensure(self, model_id: str, job_id: str = "job-1") -> Deployment:
        return await self.cluster.ensure(model_id, "r1", job_id)


async def break_deployment(network: Network, deployment: Deployment) -> None:
    """Have a deployment lose a stage that does not come up again."""
    name = next(line.actor for line in deployment.placements() if line.actor.startswith("layer:"))
    network.backend.failing = [PieceSet(stages=frozenset({0}))] * 5
    network.backend.end_piece(network.backend.pieces[name])
    await until(lambda: deployment.broken)


def test_many_jobs_at_once_deploy_their_model_once(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url)
        found = await asyncio.gather(*(network.ensure("m/one") for _ in range(20)))

        assert network.backend.deployed == ["m/one"]
        assert all(deployment is found[0] for deployment in found)

    asyncio.run(scenario())


def test_two_models_share_the_nodes_when_both_fit(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=256 * MIB)
        await asyncio.gather(network.ensure("m/one"), network.ensure("m/two"))

        assert sorted(network.backend.deployed) == ["m/one", "m/two"]
        assert network.backend.closed == []
        assert sum(network.cluster.placed_bytes().values()) > 0

    asyncio.run(scenario())


def test_an_idle_model_makes_room_and_a_busy_one_does_not(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=6 * MIB)
        first = await network.ensure("m/one")
        with pytest.raises(InsufficientCapacity):
            await network.ensure("m/two")
        assert network.backend.closed == []

        first.pipeline.let_go("job-1")
        await network.ensure("m/two")
        assert network.backend.closed == ["m/one"]

    asyncio.run(scenario())


@pytest.mark.parametrize("busy", [False, True])
def test_only_the_repair_of_a_busy_model_closes_an_idle_one(redis_url: str, busy: bool) -> None:
    async def scenario() -> None:
        network = Network(redis_url, nodes=[node(name, 6 * MIB) for name in "abcd"])
        struck, other = await network.ensure("m/one"), await network.ensure("m/two", "job-2")
        other.pipeline.let_go("job-2")
        if not busy:
            struck.pipeline.let_go("job-1")
        lost = struck.placements()[0].node
        network.nodes = [one for one in network.nodes if one.node_id != lost]
        network.cluster.node_died(lost)

        if busy:
            await until(lambda: network.backend.closed == ["m/two"])
        else:
            await until(lambda: struck.broken)
            assert network.backend.closed == []
            assert other in network.cluster.deployments

    asyncio.run(scenario())


def test_a_model_that_found_no_room_is_short_until_it_is_deployed(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=6 * MIB, now_s=7.0)
        first = await network.ensure("m/one")
        with pytest.raises(InsufficientCapacity) as refused:
            await network.ensure("m/two")
        (shortage,) = network.cluster.shortages.values()
        assert shortage.missing_bytes == refused.value.missing_bytes != ()
        assert shortage.tried_s == 7.0

        first.pipeline.let_go("job-1")
        await network.ensure("m/two")
        assert network.cluster.shortages == {}

    asyncio.run(scenario())


def test_a_model_that_never_fits_is_refused_for_good_and_closes_no_other(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=6 * MIB)
        await network.ensure("m/one")
        network.backend.structures["m/two"] = structure(400, model_id="m/two")
        with pytest.raises(InsufficientCapacity) as refused:
            await network.ensure("m/two")
        assert refused.value.code == "never_fits"
        assert network.backend.closed == []

    asyncio.run(scenario())


def test_where_nodes_come_no_model_is_too_large_to_wait_for_them(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=6 * MIB, nodes_come=True)
        network.backend.structures["m/one"] = structure(400, model_id="m/one")
        with pytest.raises(InsufficientCapacity) as refused:
            await network.ensure("m/one")
        assert refused.value.code != "never_fits"
        assert refused.value.missing_bytes

    asyncio.run(scenario())


def test_a_model_that_does_not_come_up_holds_no_room(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url)
        network.backend.failing = [PieceSet(stages=frozenset({0}))]
        with pytest.raises(WorkerLost):
            await network.ensure("m/one")

        assert network.cluster.placed_bytes() == {}
        assert network.backend.pieces == {}
        await network.ensure("m/one")

    asyncio.run(scenario())


def test_a_broken_model_is_closed_and_deployed_again_with_a_higher_epoch(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url)
        first = await network.ensure("m/one")
        await break_deployment(network, first)
        second = await network.ensure("m/one")

        assert network.backend.closed == ["m/one"]
        assert network.backend.deployed == ["m/one", "m/one"]
        assert second.topology.epoch > first.topology.epoch

    asyncio.run(scenario())


def test_a_new_scheduler_takes_over_what_stands_and_counts_its_room(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=256 * MIB)
        for name in ("m/dead", "m/unknown", "m/one"):
            await network.ensure(name)
        backend, kept = network.backend, await network.ensure("m/one")
        for name in [name for name in (*backend.pieces, *backend.pipelines) if "m-dead" in name]:
            backend.kill(name)
        backend.unknown = "m/unknown"
        deployed = len(backend.deployed)
        end_other_tasks()

        successor = network.new_cluster()
        await successor.adopt(supervisor_at_once())

        assert {name.split(":")[1] for name in backend.swept[-1]} == {"m-one"}
        assert {name.split(":")[1] for name in backend.pieces} == {"m-one"}
        assert len(backend.swept) == 2
        adopted = await successor.ensure("m/one", "r1", "job-2")
        assert adopted.topology == kept.topology
        assert len(backend.deployed) == deployed, "it is not deployed again"
        assert successor.placed_bytes() == adopted.topology.vram_bytes_by_node
        assert [one.topology.model_id for one in await network.store.all()] == ["m/one"]
        assert not successor._locks, "a model that is not asked for now has none"
        assert list(successor._turns) == [("m/one", "r1")]
        await until(lambda: adopted.topology.epoch > kept.topology.epoch)

    asyncio.run(scenario())


def test_what_fails_while_a_new_scheduler_takes_over_is_done_again_without_what_was_done(
    redis_url: str,
) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=256 * MIB)
        deployments = [await network.ensure(name) for name in ("m/one", "m/two")]
        backend = network.backend
        failing_once(backend, "structure", Unavailable("the registry is not up"))
        failing_once(backend, "structure", DeadlineExceeded("the registry did not answer"))
        end_other_tasks()

        successor = network.new_cluster()
        find, asked = backend.find, list[str]()

        async def find_later(name: str) -> bool:
            asked.append(name)
            if len(asked) == 4:
                raise ConnectionError
            return await find(name)

        backend.find = find_later  # type: ignore[method-assign]
        await successor.adopt(supervisor_at_once())
        assert [one.topology for one in successor.deployments] == [one.topology for one in deployments]
        assert backend.killed == []

        loaded = len(backend.loaded)
        lost = next(iter(backend.pieces.values()))
        backend.end_piece(lost)
        await until(lambda: bool(backend.repairs))
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(backend.loaded) == loaded + 1, "one scheduler repairs it, once"
        assert backend.killed == [lost.name]

    asyncio.run(scenario())


def test_a_job_of_an_earlier_scheduler_that_is_not_taken_over_is_ended_and_its_model_is_idle_then(
    redis_url: str,
) -> None:
    async def scenario() -> None:
        network = Network(redis_url)
        await network.ensure("m/one")
        running, ended = (asyncio.get_running_loop().create_future() for _ in range(2))
        network.backend.pipeline.jobs = {"job-1": running, "job-2": ended}
        end_other_tasks()

        successor = network.new_cluster()
        await successor.adopt(supervisor_at_once())
        (adopted,) = successor.deployments
        for deployment, job_id in successor.keep_jobs({"job-1"}):
            await deployment.pipeline.cancel(job_id)
        assert not running.done()
        assert ended.result().finish_reason is FinishReason.CANCELLED
        assert (adopted.pipeline.num_expected, adopted.pipeline.jobs) == (1, {"job-1"})

        assert successor.keep_jobs(()) == [(adopted, "job-1")]
        assert adopted.is_idle
        assert adopted.pipeline.jobs == frozenset()

    asyncio.run(scenario())


def test_a_model_whose_registry_stays_away_is_not_taken_over(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url)
        await network.ensure("m/one")
        end_other_tasks()
        successor = network.new_cluster()

        async def away(model_id: str, revision: str) -> Structure:
            network.now_s += 100.0
            raise Unavailable("the registry is not up")

        network.backend.structure = away  # type: ignore[method-assign]
        await successor.adopt(supervisor_at_once())

        assert network.now_s == 300.0
        assert successor.deployments == ()
        assert network.backend.pieces == {}
        assert await network.store.all() == []

    asyncio.run(scenario())


def used(topology: Topology) -> set[str]:
    return set(topology.vram_bytes_by_node)


@pytest.mark.parametrize(("vram_mib", "joins_mib", "beside"), [(6, 64, True), (6, 5, False)])
def test_a_model_moves_to_a_node_that_joins_and_the_room_of_both_is_kept_meanwhile(
    redis_url: str, vram_mib: int, joins_mib: int, beside: bool
) -> None:
    async def scenario() -> None:
        slow = [node(name, vram_mib * MIB, memory_bytes_per_s=1e7) for name in "ab"]
        network = Network(redis_url, nodes=slow)
        network.backend.structures["m/one"] = structure(6, model_id="m/one")
        deployment = await network.ensure("m/one")
        before, old = deployment.topology, set(network.backend.pieces)
        assert used(before) == {"a", "b"}
        assert not await network.cluster.improve(deployment), "it is where it belongs"

        network.nodes.append(node("c", joins_mib * MIB, memory_bytes_per_s=1e13, flops_per_s=1e14))
        network.room({}, {})
        placed: list[tuple[dict[str, int], set[str]]] = []
        network.backend.on_load = [
            lambda: placed.append((network.cluster.placed_bytes(), old & network.backend.pieces.keys()))
        ]
        assert await network.cluster.improve(deployment)

        now, living = placed[0]
        after = deployment.topology
        assert "c" in used(after)
        assert now["c"] >= after.vram_bytes_by_node["c"]
        if beside:
            assert living == old, "the old pieces serve while the new ones load"
            assert all(now[node_id] >= size for node_id, size in before.vram_bytes_by_node.items())
            assert network.backend.pipeline.topology.epoch > network.backend.stage(0).epoch > before.epoch
        else:
            assert living < old
        assert network.cluster.placed_bytes() == after.vram_bytes_by_node

    asyncio.run(scenario())


def test_a_model_comes_up_at_and_moves_to_the_owners_who_earned_least(redis_url: str) -> None:
    async def scenario() -> None:
        nodes = [node(name, payout_address=name) for name in "abc"]
        network = Network(redis_url, nodes=nodes, rates={"a": 3.0, "b": 1.0, "c": 2.0})
        deployment = await network.ensure("m/one")
        assert used(deployment.topology) == {"b"}
        assert not await network.cluster.share_out(deployment)

        network.rates = {"a": 3.0, "b": 5.0, "c": 2.0}
        assert await network.cluster.share_out(deployment)
        assert used(deployment.topology) == {"c"}
        await network.cluster.add_pipeline("m/one", "r1")
        assert [used(one.topology) for one in network.cluster.deployments] == [{"c"}, {"a"}]

    asyncio.run(scenario())


def test_the_scheduler_goes_on_while_pipelines_are_planned(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def noting(*given: Any, **named: Any) -> Topology:
        threads.append(threading.current_thread())
        return plan(*given, **named)

    monkeypatch.setattr("azu.planner.fairness.plan", noting)

    async def scenario() -> None:
        network = Network(redis_url)
        await network.ensure("m/one")
        await network.cluster.add_pipeline("m/one", "r1")
        assert len(network.cluster.deployments) == 2

    asyncio.run(scenario())
    assert len(threads) >= 2
    assert threading.main_thread() not in threads


def test_a_node_that_may_join_learns_what_it_would_hold(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=6 * MIB)
        network.backend.structures["m/one"] = structure(6, model_id="m/one")
        assert await network.cluster.would_hold(node("new")) == {}
        deployment = await network.ensure("m/one")
        assert len(used(deployment.topology)) == 2

        fast = node("new", memory_bytes_per_s=1e13, flops_per_s=1e14)
        slow = node("new", memory_bytes_per_s=1e6, flops_per_s=1e7)
        assert await network.cluster.would_hold(fast) == {"m/one": (6, 6)}
        assert await network.cluster.would_hold(slow) == {}
        assert await network.cluster.would_hold(node("new", MIB)) == {}
        assert network.cluster.deployments == (deployment,)

    asyncio.run(scenario())


def test_a_move_that_comes_to_nothing_leaves_everything_as_it_was(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=6 * MIB)
        network.backend.structures["m/one"] = structure(6, model_id="m/one")
        deployment = await network.ensure("m/one")
        before = deployment.topology
        network.nodes.append(node("c", 64 * MIB, memory_bytes_per_s=1e13, flops_per_s=1e14))
        network.room({}, {})
        network.backend.failing = [PieceSet(stages=frozenset({0}))]

        assert await network.cluster.improve(deployment), "it was tried"
        assert deployment.topology is before
        assert network.cluster.placed_bytes() == before.vram_bytes_by_node

    asyncio.run(scenario())


def test_a_plan_for_an_older_topology_is_dropped(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=6 * MIB)
        network.backend.structures["m/one"] = structure(6, model_id="m/one")
        deployment = await network.ensure("m/one")
        before, pieces = deployment.topology, set(network.backend.pieces)
        network.nodes.append(node("c", 64 * MIB, memory_bytes_per_s=1e13, flops_per_s=1e14))
        network.room({}, {})

        def plan_late(*arguments: object) -> TopologyChange | None:
            change = better_placement(*arguments)
            # A repair has given the deployment another topology meanwhile.
            deployment.set_topology(replace(before))
            return change

        monkeypatch.setattr("azu.cluster.cluster.better_placement", plan_late)
        assert not await network.cluster.improve(deployment)
        assert (deployment.topology, set(network.backend.pieces)) == (before, pieces)

    asyncio.run(scenario())


def test_a_node_that_leaves_gives_its_pieces_away_where_there_is_room(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=6 * MIB)
        deployment = await network.ensure("m/one")
        held = sorted(used(deployment.topology))[0]
        network.nodes.append(node("c", 5 * MIB))
        network.leaving = held
        network.room({}, {})
        assert await network.cluster.vacate(held)
        await until(lambda: held not in used(deployment.topology))
        assert not await network.cluster.vacate("d"), "it holds nothing"

        busy = sorted(used(deployment.topology))
        network.nodes = [one for one in network.nodes if one.node_id in busy]
        assert not await network.cluster.vacate(busy[0], closes_idle=True), "no other node has room"

        deployment.pipeline.let_go("job-1")
        assert not await network.cluster.vacate(busy[0])
        assert await network.cluster.vacate(busy[0], closes_idle=True), "no job waits for it"
        assert network.cluster.deployments == ()
        assert network.backend.pieces == {}

    asyncio.run(scenario())


def test_a_model_that_goes_while_another_is_closed_is_not_closed_again(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, nodes=[node("a", 64 * MIB)])
        for model_id in ("m/one", "m/two"):
            (await network.ensure(model_id)).pipeline.let_go("job-1")
        forget = network.store.forget

        async def forget_later(topology: Topology) -> None:
            network.store.forget = forget  # type: ignore[method-assign]
            await network.cluster.close()
            await forget(topology)

        network.store.forget = forget_later  # type: ignore[method-assign]
        assert await network.cluster.vacate("a", closes_idle=True)
        assert network.cluster.deployments == ()

    asyncio.run(scenario())


def test_the_room_for_what_leaves_a_node_is_kept_until_it_is_there(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, nodes=[node("a", 9 * MIB)])
        deployment = await network.ensure("m/one")
        network.nodes.append(node("b", 9 * MIB))
        network.leaving = "a"
        probed, probe = asyncio.Event(), network.backend.probe

        async def probe_later(node_ids: frozenset[str]) -> None:
            await probed.wait()
            await probe(node_ids)

        network.backend.probe = probe_later  # type: ignore[method-assign]
        for _ in range(2):
            assert await network.cluster.vacate("a")
            await until(lambda: deployment.state is DeploymentState.RECONCILING)
            assert network.cluster.promised_bytes() == {"b": deployment.topology.vram_bytes_by_node["a"]}
        with pytest.raises(InsufficientCapacity):
            await network.ensure("m/two", "job-2")

        probed.set()
        await until(lambda: used(deployment.topology) == {"b"})
        await until(lambda: deployment.state is DeploymentState.SERVING)
        assert network.cluster.promised_bytes() == {}

    asyncio.run(scenario())


def test_a_broken_model_leaves_a_node_whose_owner_wants_it_back(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url)
        deployment = await network.ensure("m/one")
        await break_deployment(network, deployment)
        deployment.pipeline.let_go("job-1")
        held = min(used(deployment.topology))

        assert not await network.cluster.vacate(held)
        assert await network.cluster.vacate(held, closes_idle=True)
        assert network.cluster.deployments == ()

    asyncio.run(scenario())


async def two_pipelines(redis_url: str) -> Network:
    """Return a network with one model that has a pipeline on each of two nodes."""
    network = Network(redis_url)
    await network.ensure("m/one")
    await network.cluster.add_pipeline("m/one", "r1")
    assert [used(one.topology) for one in network.cluster.deployments] == [{"a"}, {"b"}]
    return network


def test_a_job_goes_to_the_pipeline_with_the_fewest_unless_it_is_in_one(redis_url: str) -> None:
    async def scenario() -> None:
        network = await two_pipelines(redis_url)
        first, second = network.cluster.deployments
        assert (first.pipeline.num_expected, second.pipeline.num_expected) == (1, 0)
        assert network.cluster.beside(first) is second
        assert network.cluster.beside(second) is first

        together = [network.ensure("m/one", f"job-{number}") for number in range(2, 7)]
        assert (await asyncio.gather(*together))[0] is second
        assert (first.pipeline.num_expected, second.pipeline.num_expected) == (3, 3)
        second.pipeline.expect("job-7")
        assert await network.ensure("m/one", "job-7") is second
        await break_deployment(network, second)
        assert network.cluster.beside(first) is None
        assert await network.ensure("m/one", "job-7") is first
        assert network.backend.closed == ["m/one"]

    asyncio.run(scenario())


def test_no_pipeline_comes_where_no_node_is_left_and_none_for_a_model_that_is_gone(redis_url: str) -> None:
    async def scenario() -> None:
        network = await two_pipelines(redis_url)
        await network.cluster.add_pipeline("m/one", "r1")
        await network.cluster.add_pipeline("m/two", "r1")

        assert network.backend.deployed == ["m/one", "m/one"]

    asyncio.run(scenario())


def test_an_idle_pipeline_makes_room_for_another_model(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=9 * MIB)
        first = await network.ensure("m/one")
        await network.cluster.add_pipeline("m/one", "r1")
        await network.ensure("m/two", "job-2")

        assert network.backend.closed == ["m/one"]
        assert first in network.cluster.deployments

    asyncio.run(scenario())


def test_a_new_scheduler_takes_every_pipeline_over(redis_url: str) -> None:
    async def scenario() -> None:
        network = await two_pipelines(redis_url)
        before = [one.topology for one in network.cluster.deployments]
        end_other_tasks()

        successor = network.new_cluster()
        await successor.adopt(supervisor_at_once())

        assert [one.topology for one in successor.deployments] == before
        await until(lambda: all(one.topology.epoch > before[1].epoch for one in successor.deployments))
        assert [one.topology.replica for one in successor.deployments] == [0, 1]
        assert network.backend.deployed == ["m/one", "m/one"]

    asyncio.run(scenario())


def test_only_an_idle_pipeline_beside_one_that_serves_is_given_up(redis_url: str) -> None:
    async def scenario() -> None:
        network = await two_pipelines(redis_url)
        first, second = network.cluster.deployments
        await network.cluster.close_further(first)
        assert network.backend.closed == [], "it has a job"

        await network.cluster.close_further(second)
        first.pipeline.let_go("job-1")
        await network.cluster.close_further(first)
        assert network.cluster.deployments == (first,)

    asyncio.run(scenario())


def stage_of(network: Network, deployment: Deployment) -> str:
    """Return the name of a deployment's only stage."""
    (line,) = deployment.placements()
    assert line.actor in network.backend.pieces
    return line.actor


def test_a_lost_piece_goes_where_no_other_pipeline_of_its_model_is_while_there_is_such_a_node(
    redis_url: str,
) -> None:
    async def scenario() -> None:
        network = await two_pipelines(redis_url)
        first, second = network.cluster.deployments
        second.pipeline.let_go("job-1")
        network.nodes = [node("a", memory_bytes_per_s=1e13), node("c", memory_bytes_per_s=1e9)]
        network.backend.end_piece(network.backend.pieces[stage_of(network, second)])
        await until(lambda: used(second.topology) == {"c"})

        network.nodes.pop()
        await until(lambda: second.state is DeploymentState.SERVING)
        network.backend.end_piece(network.backend.pieces[stage_of(network, second)])
        await until(lambda: used(second.topology) == {"a"})
        await until(lambda: second.state is DeploymentState.SERVING)

        # Two on one node: one of them moves when another node comes.
        network.nodes = [node(name, memory_bytes_per_s=1e9) for name in "ad"]
        network.room({}, {})
        assert await network.cluster.improve(second)
        assert used(second.topology) == {"d"}
        assert not await network.cluster.improve(first)

    asyncio.run(scenario())


def test_a_model_leaves_a_node_whose_piece_is_slowed_down_and_does_not_come_back_at_once(
    redis_url: str,
) -> None:
    async def scenario() -> None:
        network = Network(redis_url)
        deployment = await network.ensure("m/one")
        assert used(deployment.topology) == {"a"}
        assert not await network.cluster.improve(deployment)

        slow = PieceProgress(9, 40, PieceState.IDLE, 1.0, slowdown=10.0)
        network.backend.pieces[stage_of(network, deployment)].answers.put_nowait(slow)
        await until(lambda: deployment.pieces.is_slow)
        assert await network.cluster.improve(deployment)
        assert used(deployment.topology) == {"b"}
        assert not await network.cluster.improve(deployment)

        network.now_s += 2 * POLICY.horizon_s
        network.nodes[0] = replace(network.nodes[0], memory_bytes_per_s=1e13, flops_per_s=1e14)
        assert await network.cluster.improve(deployment)
        assert used(deployment.topology) == {"a"}

    asyncio.run(scenario())


def test_a_job_is_told_how_far_its_model_is_on_the_head_and_then_on_its_nodes(redis_url: str) -> None:
    async def scenario() -> None:
        network, may_load = Network(redis_url), asyncio.Event()
        cut = ModelStatus("m/one", "r1", ModelState.CUTTING, 3 * MIB, 6 * MIB)
        network.backend.statuses = {"m/one": cut}
        before = await network.cluster.phase_of("m/one", "r1")
        network.backend.on_load = [may_load.wait] * 9
        starting = asyncio.create_task(network.ensure("m/one"))
        await until(lambda: bool(network.backend.pieces))
        during = await network.cluster.phase_of("m/one", "r1")
        may_load.set()
        deployment = await starting

        assert (before.name, before.bytes_done, before.bytes_total) == ("fetching", 3 * MIB, 6 * MIB)
        assert (during.name, during.done, during.total) == ("fetching", 0, 6)
        assert deployment.phase is None

    asyncio.run(scenario())


def test_where_no_node_lives_a_job_is_told_how_one_joins(redis_url: str) -> None:
    async def scenario() -> None:
        network = Network(redis_url, nodes=[node("a", state=NodeState.DEAD)])
        told = await network.cluster.phase_of("m/one", "r1")
        assert (told.name, "azu join" in told.text) == ("queued", True)
        network.nodes = [node("a")]
        network.backend.statuses = None
        assert (await network.cluster.phase_of("m/one", "r1")).name == "describing"

    asyncio.run(scenario())
