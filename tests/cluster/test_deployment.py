"""A deployment keeps what runs equal to what is wanted, whatever else is lost while it does so."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest

from azu.cluster.deployment import Deployment, DeploymentState
from azu.cluster.deployment_store import DeploymentStore
from azu.cluster.repairs import RepairTurns
from azu.errors import (
    DeadlineExceeded,
    HarmfulRequest,
    InsufficientCapacity,
    InternalError,
    InvalidRequest,
    NumericsError,
    Unavailable,
    WorkerLost,
)
from azu.planner.migration import TopologyChange
from azu.protocol.job import FinishReason, JobRun
from azu.protocol.step import PieceProgress, PieceState
from azu.protocol.structure import Structure
from azu.protocol.topology import ExpertSet, PieceSet, Topology
from azu.units import MIB
from tests.actors.fake_backend import FakeBackend
from tests.builders import OWNERS, job, node, structure, topology
from tests.cluster.waiting import end_other_tasks, failing_once, turns_at_once, until

SPANS = {name: (index, index + 1) for index, name in enumerate("abcd")}
SETS = (ExpertSet(0, "e", {1: (0, 1)}, 1), ExpertSet(1, "f", {1: (2, 3)}, 1))
IDLE = PieceProgress(0, 0, PieceState.IDLE, 0.1)
STRUCTURE = structure(4, moe_layers={1: 4})


def stages(*indices: int) -> PieceSet:
    return PieceSet(stages=frozenset(indices))


def expert_sets(*indices: int) -> PieceSet:
    return PieceSet(expert_sets=frozenset(indices))


FRESH = stages(1, 2) | expert_sets(1)


@dataclass
class Model:
    """A deployment of four stages and two expert sets, whose lost pieces find a place where they were."""

    redis_url: str
    room_wait_s: float = 5.0
    backend: FakeBackend = field(default_factory=FakeBackend)
    epoch: int = 1
    placed: list[PieceSet] = field(default_factory=list)
    no_room_for: int = 0  # so many times
    now_s: float = 0.0
    waited_s: list[float] = field(default_factory=list)  # by repairs, after vain ones

    def __post_init__(self) -> None:
        self.backend.nodes = {name: node(name, payout_address=OWNERS[0]) for name in "abcdefg"}
        self.turns = turns_at_once(self.waited_s)
        self.store = DeploymentStore.from_url(self.redis_url)
        self.deployment = self.deploy(self.topology)

    def deploy(self, wanted: Topology, turns: RepairTurns | None = None) -> Deployment:
        return Deployment(
            self.backend, self.store, STRUCTURE, wanted, place=self.place, commit=self.commit,
            turns=turns or self.turns, num_planned_blocks=wanted.num_blocks, room_wait_s=self.room_wait_s,
            clock=lambda: self.now_s,
        )  # fmt: skip

    @property
    def topology(self) -> Topology:
        return replace(topology(SPANS, epoch=self.epoch), expert_sets=SETS)

    async def place(self, deployment: Deployment, lost: PieceSet) -> None:
        self.placed.append(lost)
        if self.no_room_for:
            self.no_room_for -= 1
            raise InsufficientCapacity("5 bytes are missing")
        self.epoch += 1
        deployment.set_topology(replace(deployment.topology, epoch=self.epoch))

    async def commit(self, deployment: Deployment, wanted: Topology) -> None:
        self.epoch += 1
        deployment.set_topology(replace(wanted, epoch=self.epoch))

    def change(self, fresh: PieceSet = FRESH) -> TopologyChange:
        """Return a change that loads some pieces anew, one of them on another node."""
        self.epoch += 1
        moved = tuple(replace(one, node_id="g") if one.index == 2 else one for one in self.topology.stages)
        return TopologyChange(replace(self.topology, stages=moved), gone=fresh, fresh=fresh)

    def kill(self, pieces: PieceSet) -> None:
        for index in pieces.stages:
            self.backend.end_piece(self.backend.stage(index))
        for index in pieces.expert_sets:
            self.backend.end_piece(self.backend.expert_set(index))

    async def kill_and_wait(self, *losses: PieceSet) -> None:
        resumed = len(self.backend.repairs)
        for loss in losses:
            self.kill(loss)
        await self.resumed(resumed + 1)

    async def pass_time(self, seconds: int) -> None:
        """Let time pass, in which each piece is looked at every second."""
        for _ in range(seconds):
            self.now_s += 1.0
            for _ in range(10):
                await asyncio.sleep(0)

    async def resumed(self, times: int) -> None:
        await until(lambda: len(self.backend.repairs) >= times or self.deployment.broken)
        await until(lambda: self.deployment.state is not DeploymentState.RECONCILING)

    def loaded_since(self, before: int) -> list[str]:
        """Return what was loaded after the first so many loads: kind and index, sorted."""
        parts = [name.split(":") for name in self.backend.loaded[before:]]
        return sorted(f"{kind} {index}" for kind, _, _, index in parts)


def run(redis_url: str, scenario: Callable[[Model], Awaitable[None]], **given: float) -> Model:
    """Run a scenario with a model that serves; nothing of it is left when this returns."""

    async def within() -> Model:
        model = Model(redis_url, **given)  # type: ignore[arg-type]
        await model.deployment.start()
        assert model.deployment.state is DeploymentState.SERVING
        async with asyncio.timeout(20):
            await scenario(model)
        return model

    return asyncio.run(within())


def test_a_start_brings_every_piece_up_and_a_close_leaves_none(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        backend = model.backend
        assert sorted(name.split(":")[0] for name in backend.pieces) == ["expert"] * 2 + ["layer"] * 4
        assert backend.pipeline.is_running
        (record,) = await model.store.all()
        assert record.names == backend.pieces.keys() | backend.pipelines.keys()

        await model.deployment.close()

        assert not backend.pieces
        assert not backend.pipelines
        assert await model.store.all() == []
        assert model.deployment.state is DeploymentState.CLOSED

    run(redis_url, scenario)


def test_a_job_is_cancelled_although_the_first_call_fails(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        running = asyncio.create_task(model.deployment.run(job()))
        await until(lambda: bool(model.backend.pipeline.jobs))
        failing_once(model.backend, "cancel", InternalError("an exception of another kind"))

        await model.deployment.pipeline.cancel("job-1")

        assert (await running).finish_reason is FinishReason.CANCELLED

    run(redis_url, scenario)


def test_a_start_fails_with_the_error_of_the_piece_that_did_not_come_up(redis_url: str) -> None:
    async def scenario() -> None:
        model = Model(redis_url)
        model.backend.failing = [stages(3)]
        with pytest.raises(WorkerLost, match="layer:test-model:1:3"):
            await model.deployment.start()

        await model.deployment.close()
        assert not model.backend.pieces

    asyncio.run(scenario())


def test_one_round_replaces_all_that_is_lost_at_once(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        before = len(model.backend.loaded)
        await model.kill_and_wait(stages(1), stages(2), expert_sets(0))

        assert model.placed == [stages(1, 2) | expert_sets(0)]
        assert model.loaded_since(before) == ["expert 0", "layer 1", "layer 2"]
        assert model.backend.pipeline.is_running
        assert model.backend.repairs == [True]
        assert model.backend.probed == [frozenset("bce")]

    run(redis_url, scenario)


def test_what_is_lost_during_a_round_is_replaced_before_the_pipeline_goes_on(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        before = len(model.backend.loaded)
        model.backend.on_load = [lambda: model.kill(stages(3))]
        await model.kill_and_wait(stages(1))

        # The stage that was up already is filled as well, but not loaded twice.
        assert model.placed == [stages(1), stages(3)]
        assert model.loaded_since(before) == ["layer 1", "layer 3"]
        assert model.backend.repairs == [True]

    run(redis_url, scenario)


def test_a_piece_that_dies_while_it_loads_is_placed_again(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.backend.failing = [stages(2)]
        await model.kill_and_wait(stages(1, 2))

        assert model.placed == [stages(1, 2), stages(2)]

    run(redis_url, scenario)


def test_a_piece_that_comes_up_on_a_node_that_dies_fails_at_once(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        async def hang() -> None:
            model.deployment.node_lost("b")
            await asyncio.sleep(3600)

        model.backend.on_load = [hang]
        await model.kill_and_wait(stages(1))

        assert model.placed == [stages(1), stages(1)]

    run(redis_url, scenario)


def test_a_dead_node_loses_all_its_pieces_without_their_actors_reporting_it(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.deployment.node_lost("e")
        model.deployment.node_lost("a")
        await model.resumed(1)

        assert model.placed == [stages(0) | expert_sets(0)]

    run(redis_url, scenario)


def test_a_survivor_that_does_not_take_its_neighbours_is_replaced_too(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.backend.deaf = [stages(0)]
        await model.kill_and_wait(stages(1))

        assert model.placed == [stages(1), stages(0)]

    run(redis_url, scenario)


def test_losses_one_after_another_are_repaired_one_after_another(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        for index in (0, 3, 1, 1, 2, 0):
            model.backend.pipeline.completed += 1
            await model.kill_and_wait(stages(index))

        assert [len(lost.stages) for lost in model.placed] == [1] * 6

    run(redis_url, scenario)


def test_room_that_is_reported_a_moment_later_is_waited_for(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.no_room_for = 2
        await model.kill_and_wait(stages(1))

        assert model.placed == [stages(1)] * 3

    run(redis_url, scenario)


def test_a_loss_that_finds_no_room_breaks_the_deployment_and_ends_its_jobs(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        running = asyncio.create_task(model.deployment.run(job()))
        await until(lambda: bool(model.backend.pipeline.jobs))
        model.no_room_for = 1000
        await model.kill_and_wait(stages(1))

        assert model.deployment.state is DeploymentState.BROKEN
        ended = await running
        assert isinstance(ended.error, WorkerLost)
        assert "5 bytes are missing" in ended.error.message
        model.backend.end_pipeline()
        with pytest.raises(WorkerLost, match="5 bytes"):
            await model.deployment.run(job())

    run(redis_url, scenario, room_wait_s=0.3)


def test_pieces_that_never_come_up_break_the_deployment(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.backend.failing = [stages(1)] * 10
        await model.kill_and_wait(stages(1))

        assert model.deployment.broken
        assert len(model.placed) == 5

    run(redis_url, scenario)


def test_a_step_that_kills_its_stage_is_not_tried_for_ever(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        while not model.deployment.broken:
            await model.kill_and_wait(stages(1))

        assert len(model.placed) == 5

    run(redis_url, scenario)


def test_a_report_without_pieces_has_the_steps_taken_again_and_replaces_nothing(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        loaded = len(model.backend.loaded)
        model.backend.report(PieceSet())
        await model.resumed(1)

        assert len(model.backend.loaded) == loaded
        assert model.backend.pipeline.topology.epoch == 2
        assert model.backend.repairs == [True]

    run(redis_url, scenario)


@pytest.mark.parametrize("error", [InternalError("it has a bug"), ZeroDivisionError()])
@pytest.mark.parametrize("call", ["pause", "probe", "resume", "next_loss"])
def test_a_call_that_fails_for_an_unknown_reason_is_made_again(
    redis_url: str, call: str, error: Exception
) -> None:
    async def scenario(model: Model) -> None:
        failing_once(model.backend, call, error)
        for loss in (stages(1), stages(2) | expert_sets(0)):
            await model.kill_and_wait(loss)

        assert not model.deployment.broken
        assert {"layer 1", "layer 2", "expert 0"} <= set(model.loaded_since(6))

    run(redis_url, scenario)


def test_what_a_failed_repair_began_is_begun_again(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        failing_once(model.backend, "load", ZeroDivisionError())
        failing_once(model.store, "keep", ZeroDivisionError())
        await model.kill_and_wait(stages(1))
        await until(lambda: model.deployment.state is DeploymentState.SERVING)

        assert model.loaded_since(6).count("layer 1") >= 2
        assert not model.deployment.broken

    run(redis_url, scenario)


def test_a_repair_that_always_fails_for_an_unknown_reason_breaks_the_deployment(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        async def probe(_: frozenset[str]) -> None:
            raise ZeroDivisionError

        model.backend.probe = probe  # type: ignore[method-assign]
        model.kill(stages(1))
        await until(lambda: model.deployment.broken)

        assert model.waited_s

    run(redis_url, scenario)


def test_a_repair_waits_for_a_registry_that_does_not_answer_for_long(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        start, num_calls = model.backend.start_pipeline, 0

        async def start_pipeline(name: str, structure: Structure, topology: Topology) -> None:
            nonlocal num_calls
            num_calls += 1
            if num_calls < 10:
                raise DeadlineExceeded("the registry did not answer in time")
            await start(name, structure, topology)

        model.backend.start_pipeline = start_pipeline  # type: ignore[method-assign]
        model.backend.kill(model.deployment.pipeline.name)
        await until(lambda: model.backend.repairs == [True] or model.deployment.broken)

        assert not model.deployment.broken
        assert len(model.waited_s) == 9

    run(redis_url, scenario)


def test_only_a_repair_after_a_vain_one_waits_and_each_time_longer(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        await model.kill_and_wait(stages(1))
        assert model.waited_s == []
        while not model.deployment.broken:
            await model.kill_and_wait(stages(1))

        assert len(model.waited_s) == 4
        assert all(2**vain / 2 <= waited <= 2**vain for vain, waited in enumerate(model.waited_s))

    run(redis_url, scenario)


def test_two_pipelines_of_a_model_are_repaired_one_after_the_other(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        other = Model(redis_url)
        other.deployment = other.deploy(other.topology, turns=model.turns)
        await other.deployment.start()
        may_load, loads = asyncio.Event(), model.backend.on_load
        loads.append(may_load.wait)
        model.kill(stages(1))
        await until(lambda: not loads)
        other.kill(stages(2))
        await until(lambda: other.deployment.state is DeploymentState.RECONCILING)
        for _ in range(50):
            await asyncio.sleep(0)
        assert other.placed == []

        may_load.set()
        await model.resumed(1)
        await other.resumed(1)
        assert other.placed == [stages(2)]

    run(redis_url, scenario)


def test_a_job_in_whose_steps_pieces_are_lost_three_times_is_ended_and_the_model_lives(
    redis_url: str,
) -> None:
    async def scenario(model: Model) -> None:
        deployment, pipeline = model.deployment, model.backend.pipeline
        running = {name: asyncio.create_task(deployment.run(job(name))) for name in ("good", "bad")}
        await until(lambda: len(pipeline.jobs) == 2)
        pipeline.under_way = {("good", 0): 7, ("bad", 0): 5}
        for index in (1, 2):
            await model.kill_and_wait(stages(index))
        assert model.backend.alone == [frozenset(), frozenset({("good", 0), ("bad", 0)})]

        # The good one came further alone; in the next step was the bad one.
        pipeline.completed += 1
        pipeline.under_way = {("bad", 0): 5}
        await model.kill_and_wait(stages(3))
        assert isinstance((await running["bad"]).error, HarmfulRequest)
        assert deployment.state is DeploymentState.SERVING
        assert set(pipeline.jobs) == {"good"}

    run(redis_url, scenario)


def test_suspects_run_alone_until_they_come_further_whatever_the_pipeline_is_paused_for(
    redis_url: str,
) -> None:
    async def scenario(model: Model) -> None:
        deployment, pipeline, alone = model.deployment, model.backend.pipeline, model.backend.alone
        running = [asyncio.create_task(deployment.run(job(name))) for name in ("good", "bad")]
        await until(lambda: len(pipeline.jobs) == 2)
        pipeline.under_way = {("good", 0): 7, ("bad", 0): 5}
        for index in (1, 2):
            await model.kill_and_wait(stages(index))
        suspects = alone[-1]
        assert suspects == {("good", 0), ("bad", 0)}

        deployment.node_lost("d")
        await model.resumed(3)
        await deployment.resize(model.topology.num_blocks - 1)
        await until(lambda: len(alone) == 4)
        assert alone[2:] == [suspects, suspects]

        await until(lambda: deployment.state is DeploymentState.SERVING)
        pipeline.under_way = {("good", 0): 8}
        deployment.node_lost("d")
        await until(lambda: len(alone) == 5)
        assert alone[4] == {("bad", 0)}
        for name in ("good", "bad"):
            model.backend.end_job(name)
        assert [(await one).error for one in running] == [None, None]

    run(redis_url, scenario)


def test_a_piece_that_answers_no_more_is_replaced_after_a_minute_on_another_node_without_blame(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(model: Model) -> None:
        actors = [model.backend.stage(index) for index in range(4)]
        for _ in range(60):
            for actor in actors:
                if actor is not actors[1]:
                    actor.answers.put_nowait(IDLE)
            await model.pass_time(1)
            if model.now_s == 1:
                actors[1].answers.put_nowait(IDLE)
        assert model.placed == []
        assert model.deployment.pieces.is_slow
        await model.pass_time(2)
        await until(lambda: bool(model.placed))
        assert model.deployment.pieces.avoided == {"b"}
        await model.resumed(1)

        assert model.placed == [stages(1)]
        assert model.deployment.pieces.avoided == set()
        assert model.backend.blamed == []

    monkeypatch.setattr("azu.cluster.pieces._LOOK_S", 0.0)
    run(redis_url, scenario)


def test_a_piece_that_comes_on_slowly_is_waited_for(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(model: Model) -> None:
        for layer in range(4):
            for index in range(4):
                model.backend.stage(index).answers.put_nowait(PieceProgress(1, layer, PieceState.BUSY, 1.0))
            for index in range(2):
                model.backend.expert_set(index).answers.put_nowait(IDLE)
            await model.pass_time(50)
        assert model.deployment.pieces.is_slow
        assert model.placed == []
        assert model.backend.killed == []

    monkeypatch.setattr("azu.cluster.pieces._LOOK_S", 0.0)
    run(redis_url, scenario)


def test_a_look_at_the_pipeline_says_whether_a_piece_computes(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(model: Model) -> None:
        computing = []
        for state in (PieceState.BUSY, PieceState.WAITING, PieceState.IDLE):
            model.backend.stage(2).answers.put_nowait(PieceProgress(1, 0, state, 1.0))
            await model.pass_time(1)
            look = await model.deployment.look()
            assert look is not None
            computing.append(look.is_computing)
        assert computing == [True, True, False]

    monkeypatch.setattr("azu.cluster.pieces._LOOK_S", 0.0)
    run(redis_url, scenario)


def test_a_stage_is_linked_after_its_step_however_long_that_is_unless_it_dies(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.backend.long_steps = {0, 2}
        model.kill(stages(1))
        await until(lambda: model.backend.long_steps == set())
        model.backend.steps_end.set()
        await model.resumed(1)
        assert model.placed == [stages(1)]

        model.backend.steps_end.clear()
        model.backend.long_steps = {0, 2}
        model.kill(stages(1))
        await until(lambda: model.backend.long_steps == set())
        model.kill(stages(2))
        model.backend.steps_end.set()
        await model.resumed(2)
        assert model.placed[1:] == [stages(1), stages(2)]

    run(redis_url, scenario)


def test_the_room_of_what_moves_is_kept_while_what_moved_before_it_finds_its_place(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        deployment, loads = model.deployment, model.backend.on_load
        probing, may_place, may_load = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def probe(_: frozenset[str]) -> None:
            probing.set()
            await may_place.wait()

        model.backend.probe = probe  # type: ignore[method-assign]
        deployment.move_off("b", [replace(model.topology.stages[1], node_id="f")])
        await probing.wait()
        deployment.move_off("c", [replace(model.topology.stages[2], node_id="g")])
        assert deployment.promised_bytes() == {"f": MIB, "g": MIB}
        assert deployment.promised_bytes(stages(1)) == {"f": MIB}
        loads.append(may_load.wait)
        may_place.set()
        await until(lambda: not loads)
        assert model.placed == [stages(1)]
        assert deployment.promised_bytes() == {"g": MIB}

        may_load.set()
        await model.resumed(1)
        assert model.placed == [stages(1), stages(2)]
        assert deployment.promised_bytes() == {}

    run(redis_url, scenario)


def test_a_report_counts_only_for_pieces_that_were_not_replaced_since(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        await model.kill_and_wait(stages(1))
        stale = replace(model.topology, epoch=1)
        model.backend.pipeline.topology = stale
        model.backend.report(stages(1), is_bad_frame=True)
        model.backend.report(stages(0), is_bad_frame=True)
        await model.resumed(2)

        assert model.placed == [stages(1), stages(0)]
        assert model.backend.blamed == ["a"], "only the node of the piece that is still there"

    run(redis_url, scenario)


def test_no_job_is_harmful_because_stages_lie_in_its_steps(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        running = asyncio.create_task(model.deployment.run(job()))
        await until(lambda: bool(model.backend.pipeline.jobs))
        model.backend.pipeline.under_way = {("job-1", 0): 7}
        for times in range(1, 5):
            model.backend.report(stages(3), is_bad_frame=True)
            await model.resumed(times)

        assert model.backend.blamed == ["d"] * 4
        assert model.backend.alone == [frozenset()] * 4
        model.backend.end_job("job-1")
        assert (await running).error is None

    run(redis_url, scenario)


@pytest.mark.parametrize(
    "leave",
    [
        lambda model, node_id: model.deployment.node_lost(node_id),
        lambda model, node_id: model.deployment.blame(node_id),
        lambda model, node_id: model.deployment.move_off(node_id, ()),
    ],
)
def test_no_job_is_harmful_because_nodes_die_are_blamed_or_left_in_its_steps(
    redis_url: str, leave: Callable[[Model, str], None]
) -> None:
    async def scenario(model: Model) -> None:
        running = asyncio.create_task(model.deployment.run(job()))
        await until(lambda: bool(model.backend.pipeline.jobs))
        model.backend.pipeline.under_way = {("job-1", 0): 7}
        for times, node_id in enumerate("bcd", 1):
            leave(model, node_id)
            await model.resumed(times)

        assert model.placed == [stages(1), stages(2), stages(3)]
        assert model.backend.alone == [frozenset()] * 3
        model.backend.end_job("job-1")
        assert (await running).error is None

    run(redis_url, scenario)


def test_a_sequence_whose_values_are_not_finite_marks_the_node_for_its_owner(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        running = asyncio.create_task(model.deployment.run(job()))
        await until(lambda: bool(model.backend.pipeline.jobs))
        error = NumericsError("values that are not finite", node_id="b", layer=3)
        model.backend.pipeline.jobs["job-1"].set_result(JobRun(0, FinishReason.ERROR, error=error))

        assert (await running).error is error
        assert model.backend.marked == [("b", "test/model", 3, job().address)]
        assert not model.placed, "nothing is lost"

    run(redis_url, scenario)


def test_a_pipeline_that_dies_is_replaced_and_its_jobs_go_on(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        running = asyncio.create_task(model.deployment.run(job()))
        await until(lambda: bool(model.backend.pipeline.jobs))
        model.backend.end_pipeline()
        await model.resumed(1)
        await until(lambda: bool(model.backend.pipeline.jobs))
        model.backend.end_job(job().job_id)

        ended = await running
        assert ended.finish_reason is FinishReason.STOP
        assert [line.node for line in ended.placements] == list("abcdef")
        assert model.backend.repairs == [True]

    run(redis_url, scenario)


def test_a_prompt_that_no_number_of_blocks_would_hold_is_refused(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        longest = model.topology.num_blocks * model.topology.block_size
        with pytest.raises(InvalidRequest):
            await model.deployment.run(replace(job(), prompt_token_ids=(1,) * longest))
        assert job().job_id not in model.deployment.pipeline.jobs

    run(redis_url, scenario)


def test_another_number_of_blocks_runs_under_a_new_epoch_and_is_no_repair(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        loaded = len(model.backend.loaded)
        model.backend.pipeline.blocks_in_use = 5
        await model.deployment.resize(3)
        await model.resumed(1)

        assert model.deployment.topology.num_blocks == 5, "blocks that are needed are kept"
        assert model.deployment.topology.epoch == 2
        assert model.backend.repairs == [False]
        assert len(model.backend.loaded) == loaded

    run(redis_url, scenario)


@pytest.mark.parametrize("beside", [True, False])
def test_a_change_fills_all_that_is_fresh_and_loads_it_once(redis_url: str, beside: bool) -> None:
    async def scenario(model: Model) -> None:
        before = len(model.backend.loaded)
        old = model.backend.stage(2).name
        assert await model.deployment.change(model.change(), beside=beside)

        assert model.loaded_since(before) == ["expert 1", "layer 1", "layer 2"]
        assert old in model.backend.killed
        assert model.backend.stage(2).piece.node_id == "g"
        assert model.backend.repairs == [False], "nothing was lost"

    run(redis_url, scenario)


def test_a_change_is_given_up_for_a_loss_and_what_is_lost_is_replaced(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.backend.on_load = [lambda: model.kill(stages(3))]
        assert not await model.deployment.change(model.change(), beside=True)
        await model.resumed(1)

        assert model.placed == [stages(3)]
        assert model.backend.stage(2).piece.node_id == "c", "the change was not made"
        assert len(model.backend.pieces) == 6, "what was loaded beside is gone"

    run(redis_url, scenario)


def test_what_is_lost_during_a_change_is_replaced_where_it_is_then(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.backend.on_load = [lambda: model.kill(stages(3))]
        assert await model.deployment.change(model.change(), beside=False)

        assert model.placed == [stages(3)]
        assert model.backend.stage(2).piece.node_id == "g"
        assert model.backend.repairs == [True]

    run(redis_url, scenario)


def test_a_model_serves_while_what_a_change_needs_is_fetched(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        fetching, fetched = asyncio.Event(), asyncio.Event()

        async def fetch() -> None:
            fetching.set()
            await fetched.wait()

        model.backend.on_fetch = [fetch]
        changing = asyncio.create_task(model.deployment.change(model.change(), beside=False))
        await fetching.wait()
        assert model.backend.pipeline.is_running
        assert model.deployment.state is DeploymentState.SERVING
        assert model.backend.killed == []
        fetched.set()

        assert await changing
        assert model.backend.stage(2).piece.node_id == "g"

    run(redis_url, scenario)


def test_a_change_whose_pieces_cannot_be_fetched_changes_nothing(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        async def fails() -> None:
            raise Unavailable("the registry is not up")

        model.backend.on_fetch = [fails]
        assert not await model.deployment.change(model.change(), beside=False)

        assert model.deployment.topology.epoch == 1
        assert (model.backend.repairs, model.backend.killed) == ([], [])

    run(redis_url, scenario)


def test_a_change_whose_pieces_do_not_come_up_changes_nothing(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.backend.failing = [stages(2)]
        assert not await model.deployment.change(model.change(), beside=True)

        assert model.deployment.topology.epoch == 1
        assert model.backend.repairs == []
        assert len(model.backend.pieces) == 6

    run(redis_url, scenario)


def test_a_deployment_that_repairs_takes_no_change(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        refused: list[asyncio.Task[bool]] = []

        def ask() -> None:
            change = model.deployment.change(model.change(), beside=False)
            refused.append(asyncio.create_task(change))

        model.backend.on_load = [ask]
        model.backend.failing = [stages(1)]  # the repair takes two rounds
        await model.kill_and_wait(stages(1))

        assert not await refused[0]

    run(redis_url, scenario)


def test_a_close_ends_a_change_that_is_under_way(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        loading = asyncio.Event()

        async def hang() -> None:
            loading.set()
            await asyncio.sleep(3600)

        model.backend.on_load = [hang]
        changing = asyncio.create_task(model.deployment.change(model.change(), beside=True))
        await loading.wait()
        await model.deployment.close()

        assert not await changing
        assert not model.backend.pieces

    run(redis_url, scenario)


def test_the_next_scheduler_takes_over_what_lives_and_starts_the_rest(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        model.backend.pipeline.jobs["job-1"] = asyncio.get_running_loop().create_future()
        (record,) = await model.store.all()
        model.backend.pieces.pop(model.backend.stage(2).name)
        before = len(model.backend.loaded)
        end_other_tasks()

        successor = model.deploy(record.topology)
        await successor.adopt(record)
        assert job().job_id in successor.pipeline.jobs, "its job still runs in the pipeline"
        await model.resumed(1)

        assert model.loaded_since(before) == ["layer 2"]
        (kept,) = await model.store.all()
        assert kept.topology.epoch == 2
        assert kept.names == model.backend.pieces.keys() | model.backend.pipelines.keys()

    run(redis_url, scenario)


def test_the_next_scheduler_starts_a_pipeline_where_it_is_gone(redis_url: str) -> None:
    async def scenario(model: Model) -> None:
        (record,) = await model.store.all()
        model.backend.pipelines.clear()
        end_other_tasks()

        await model.deploy(record.topology).adopt(record)
        await model.resumed(1)

        assert model.backend.pipeline.is_running
        assert model.backend.repairs == [True]

    run(redis_url, scenario)
