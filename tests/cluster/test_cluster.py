"""Models are deployed when a job needs them, once, and idle ones make room."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from azu.cluster.cluster import Cluster
from azu.cluster.deployment import Commit, Replan
from azu.cluster.deployment_store import DeploymentRecord, RedisStanding, StandingPiece
from azu.errors import InsufficientCapacity, ModelNotFound
from azu.planner.migration import TopologyChange
from azu.planner.policy import PlanPolicy
from azu.protocol.job import Job, JobRun
from azu.protocol.node import Node
from azu.protocol.structure import Structure
from azu.protocol.topology import PieceSet, Topology
from azu.units import MIB
from tests.builders import ALICE, node, structure

POLICY = PlanPolicy(promised_sequences=2, tokens_per_sequence=128)


@dataclass
class StandingModel:
    """A deployed model whose jobs the test counts."""

    structure: Structure
    topology: Topology
    builder: "CountingBuilder"
    replan: Replan
    running: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    broken: bool = False

    @property
    def running_jobs(self) -> int:
        return len(self.running)

    def expect(self, job_id: str) -> None:
        self.running.add(job_id)

    def holds(self, job_id: str) -> bool:
        return job_id in self.held

    async def run(self, job: Job) -> JobRun:
        raise AssertionError("the fleet runs no jobs")

    async def cancel(self, job_id: str) -> None:
        raise AssertionError("the fleet cancels no jobs")

    def node_died(self, node_id: str) -> None:
        raise AssertionError("no node dies here")

    async def move(self, change: TopologyChange, commit: Commit, *, beside: bool) -> bool:
        self.builder.moves.append((change, beside))
        if not self.builder.on_move():
            return False
        await commit()
        return True

    async def close(self) -> None:
        self.builder.closed.append(self.topology.model_id)


@dataclass
class CountingBuilder:
    """Builds nothing, but remembers; Ray's own builder is tested in the cluster."""

    built: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    num_layers: int = 4
    swept: frozenset[str] | None = None
    unknown: str | None = None
    nodes: list[Node] = field(default_factory=list)
    dead: frozenset[str] = frozenset()
    moves: list[tuple[TopologyChange, bool]] = field(default_factory=list)
    on_move: Callable[[], bool] = lambda: True

    async def structure(self, model_id: str, revision: str) -> Structure:
        if model_id == self.unknown:
            raise ModelNotFound(f"there is no {model_id} any more")
        await asyncio.sleep(0)
        return structure(self.num_layers, model_id=model_id)

    async def build(self, structure: Structure, topology: Topology, replan: Replan) -> StandingModel:
        await asyncio.sleep(0.01)
        self.built.append(structure.model_id)
        return StandingModel(structure, topology, self, replan)

    async def adopt(self, structure: Structure, standing: DeploymentRecord, replan: Replan) -> StandingModel:
        assert self.swept is not None, "what stands in the way goes first"
        return StandingModel(structure, standing.topology, self, replan)

    async def sweep(self, kept: frozenset[str]) -> frozenset[str]:
        self.swept = kept
        return kept - self.dead


def fleet(
    redis_url: str,
    vram_bytes: int = 64 * MIB,
    *,
    nodes_come: bool = False,
    builder: CountingBuilder | None = None,
    policy: PlanPolicy = POLICY,
) -> tuple[Cluster, CountingBuilder]:
    builder = builder or CountingBuilder()
    builder.nodes = [node("a", vram_bytes), node("b", vram_bytes)]

    def book(placed: Mapping[str, int], given_back: Mapping[str, int]) -> list[Node]:
        free = {one.node_id: one.vram_total_bytes - placed.get(one.node_id, 0) for one in builder.nodes}
        return [replace(one, vram_free_bytes=max(0, free[one.node_id])) for one in builder.nodes]

    standing = RedisStanding.from_url(redis_url)
    return Cluster(builder, book, policy, standing, nodes_come=nodes_come), builder


def test_many_jobs_at_once_deploy_their_model_once(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = fleet(redis_url)
        found = await asyncio.gather(*(models.ensure("m/one", "r1", "job-1") for _ in range(20)))

        assert builder.built == ["m/one"]
        assert all(model is found[0] for model in found)

    asyncio.run(scenario())


def test_two_models_share_the_nodes_when_both_fit(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = fleet(redis_url, vram_bytes=256 * MIB)
        await asyncio.gather(models.ensure("m/one", "r1", "job-1"), models.ensure("m/two", "r1", "job-1"))

        assert sorted(builder.built) == ["m/one", "m/two"]
        assert builder.closed == []
        assert sum(models.placed_bytes().values()) > 0

    asyncio.run(scenario())


def test_an_idle_model_makes_room_and_a_busy_one_does_not(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = fleet(redis_url, vram_bytes=6 * MIB)
        first = await models.ensure("m/one", "r1", "job-1")
        with pytest.raises(InsufficientCapacity):
            await models.ensure("m/two", "r1", "job-1")
        assert builder.closed == []

        first.running.clear()
        await models.ensure("m/two", "r1", "job-1")
        assert builder.closed == ["m/one"]

    asyncio.run(scenario())


def test_a_model_that_never_fits_is_refused_for_good_and_takes_nobody_down(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = fleet(redis_url, vram_bytes=6 * MIB)
        await models.ensure("m/one", "r1", "job-1")
        builder.num_layers = 400
        with pytest.raises(InsufficientCapacity) as refused:
            await models.ensure("m/two", "r1", "job-1")
        assert refused.value.code == "never_fits"
        assert builder.closed == []

    asyncio.run(scenario())


def test_where_nodes_come_no_model_is_too_large_to_wait_for_them(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = fleet(redis_url, vram_bytes=6 * MIB, nodes_come=True)
        builder.num_layers = 400
        with pytest.raises(InsufficientCapacity) as refused:
            await models.ensure("m/one", "r1", "job-1")
        assert refused.value.code != "never_fits"
        assert refused.value.missing_bytes

    asyncio.run(scenario())


def test_a_broken_model_is_taken_down_and_built_again_with_a_higher_epoch(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = fleet(redis_url)
        first = await models.ensure("m/one", "r1", "job-1")
        first.broken = True
        second = await models.ensure("m/one", "r1", "job-1")

        assert builder.closed == ["m/one"]
        assert builder.built == ["m/one", "m/one"]
        assert second.topology.epoch > first.topology.epoch

    asyncio.run(scenario())


def test_a_new_scheduler_takes_over_what_stands_and_counts_its_room(redis_url: str) -> None:
    async def scenario() -> None:
        models, _ = fleet(redis_url)
        standing = RedisStanding.from_url(redis_url)
        for name in ("m/dead", "m/two", "m/one"):
            stands = await models.ensure(name, "r1", "job-1")
            pieces = (StandingPiece(True, 0, stands.topology.epoch, f"layer:{name}"),)
            await standing.keep(DeploymentRecord(stands.topology, pieces, f"pipeline:{name}", {"a": ALICE}))

        heirs, heirs_builder = fleet(redis_url)
        heirs_builder.unknown = "m/two"
        heirs_builder.dead = frozenset({"layer:m/dead", "pipeline:m/dead"})
        await heirs.adopt()

        assert heirs_builder.swept == {"layer:m/one", "pipeline:m/one"}
        adopted = await heirs.ensure("m/one", "r1", "job-1")
        assert heirs_builder.built == []
        assert heirs.placed_bytes() == adopted.topology.vram_bytes_by_node
        assert [one.topology.model_id for one in await standing.all()] == ["m/one"]
        moved = await adopted.replan(PieceSet(stages=frozenset({0})))
        assert moved.epoch > stands.topology.epoch, "no epoch comes twice, whoever schedules"

    asyncio.run(scenario())


def used(topology: Topology) -> set[str]:
    return set(topology.vram_bytes_by_node)


@pytest.mark.parametrize(("vram_mib", "joins_mib", "beside"), [(6, 64, True), (6, 5, False)])
def test_a_model_moves_to_a_node_that_joins_and_the_room_of_both_is_kept_meanwhile(
    redis_url: str, vram_mib: int, joins_mib: int, beside: bool
) -> None:
    async def scenario() -> None:
        models, builder = fleet(redis_url, vram_bytes=vram_mib * MIB)
        builder.num_layers = 6
        builder.nodes = [replace(one, memory_bytes_per_s=1e7) for one in builder.nodes]
        model = await models.ensure("m/one", "r1", "job-1")
        before = model.topology
        assert used(before) == {"a", "b"}
        assert not await models.improve(model), "it is where it belongs"

        builder.nodes.append(node("c", joins_mib * MIB, memory_bytes_per_s=1e13, flops_per_s=1e14))
        counted: list[dict[str, int]] = []
        builder.on_move = lambda: counted.append(models.placed_bytes()) is None
        assert await models.improve(model)

        ((change, was_beside),) = builder.moves
        assert was_beside is beside
        needed = change.fresh_bytes if beside else model.topology.vram_bytes_by_node
        assert all(counted[0][node_id] >= size for node_id, size in needed.items())
        assert "c" in used(model.topology)
        assert model.topology.epoch > change.topology.epoch > before.epoch, "what was loaded is older"
        assert models.placed_bytes() == model.topology.vram_bytes_by_node

    asyncio.run(scenario())


def test_a_move_that_comes_to_nothing_leaves_everything_as_it_was(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = fleet(redis_url, vram_bytes=6 * MIB)
        builder.num_layers = 6
        model = await models.ensure("m/one", "r1", "job-1")
        before = model.topology
        builder.nodes.append(node("c", 64 * MIB, memory_bytes_per_s=1e13, flops_per_s=1e14))
        builder.on_move = lambda: False

        assert await models.improve(model), "it was tried"
        assert model.topology is before
        assert models.placed_bytes() == before.vram_bytes_by_node

    asyncio.run(scenario())


async def two_pipelines(redis_url: str) -> tuple[Cluster, CountingBuilder]:
    """Return a fleet of one model that has a pipeline on each of two nodes."""
    models, builder = fleet(redis_url)
    await models.ensure("m/one", "r1", "job-1")
    await models.widen("m/one", "r1")
    assert [used(one.topology) for one in models.models] == [{"a"}, {"b"}]
    return models, builder


def test_a_job_goes_to_the_pipeline_with_the_fewest_unless_it_is_in_one(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = await two_pipelines(redis_url)
        first, second = models.models
        assert (first.running_jobs, second.running_jobs) == (1, 0)

        together = [models.ensure("m/one", "r1", f"job-{number}") for number in range(2, 7)]
        assert (await asyncio.gather(*together))[0] is second
        assert (first.running_jobs, second.running_jobs) == (3, 3)
        second.held.add("job-7")
        assert await models.ensure("m/one", "r1", "job-7") is second
        second.broken = True
        assert await models.ensure("m/one", "r1", "job-7") is first
        assert builder.closed == ["m/one"]

    asyncio.run(scenario())


def test_no_pipeline_comes_where_no_node_is_left_and_none_for_a_model_that_is_gone(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = await two_pipelines(redis_url)
        await models.widen("m/one", "r1")
        await models.widen("m/two", "r1")

        assert builder.built == ["m/one", "m/one"]

    asyncio.run(scenario())


def test_an_idle_pipeline_makes_room_for_another_model(redis_url: str) -> None:
    async def scenario() -> None:
        models, builder = fleet(redis_url, vram_bytes=9 * MIB)
        first = await models.ensure("m/one", "r1", "job-1")
        await models.widen("m/one", "r1")
        await models.ensure("m/two", "r1", "job-2")

        assert builder.closed == ["m/one"]
        assert first in models.models

    asyncio.run(scenario())


def test_a_new_scheduler_takes_every_pipeline_over(redis_url: str) -> None:
    async def scenario() -> None:
        models, _ = await two_pipelines(redis_url)
        standing = RedisStanding.from_url(redis_url)
        for one in models.models:
            pieces = (StandingPiece(True, 0, one.topology.epoch, f"layer:{one.topology.replica}"),)
            await standing.keep(
                DeploymentRecord(one.topology, pieces, f"pipeline:{one.topology.replica}", {"a": ALICE})
            )

        heirs, builder = fleet(redis_url)
        await heirs.adopt()

        assert [one.topology for one in heirs.models] == [one.topology for one in models.models]
        lost = await heirs.models[1].replan(PieceSet(stages=frozenset({0})))
        assert lost.replica == 1
        assert builder.built == []

    asyncio.run(scenario())
