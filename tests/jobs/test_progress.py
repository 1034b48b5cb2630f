"""What moves is left alone; what stands still is helped, each time by more."""

import asyncio
from dataclasses import dataclass, field, replace

from azu.cluster.liveness import STILL_S, STILL_STEPS
from azu.config.network import RetryPolicy
from azu.errors import AzuError, InternalError, Unavailable, WorkerLost
from azu.jobs.progress import (
    UNHELD_S,
    ProgressWatch,
    Remedy,
    RunningJob,
    Standstill,
    Watchdog,
)
from azu.protocol.job import FinishReason, Job, JobRun, PipelineLook
from azu.protocol.phase import JobPhase, queued
from tests.builders import OwnPipeline, job, structure

PERIOD_S = 2.0
BUDGET_S = 120.0


@dataclass
class Pipeline:
    """A pipeline that a watchdog sees every two seconds."""

    step_s: float = 0.1
    completed: int = 0
    moved: dict[str, int] = field(default_factory=lambda: {"a": 1, "b": 1})
    no_room: frozenset[str] = frozenset()
    expected: tuple[str, ...] = ("a", "b")
    repaired: bool = False
    computing: bool = False
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(BUDGET_S, lambda: self.now_s)

    def run(self, seconds: float, *, moving: str = "", stepping: bool = True) -> list[tuple[float, str, str]]:
        """Let time pass in which some jobs move; return what was found: when, the remedy and the job."""
        found: list[Standstill] = []
        times = []
        for _ in range(round(seconds / PERIOD_S)):
            self.now_s += PERIOD_S
            self.completed += stepping
            self.moved = {job: number + (job in moving) for job, number in self.moved.items()}
            look = PipelineLook(
                self.completed, self.step_s, dict(self.moved), self.no_room, is_computing=self.computing
            )
            new = self.watchdog.look(self.expected, None if self.repaired else look)
            times += [self.now_s] * len(new)
            found += new
        return [(at, one.remedy.value, one.job_id) for at, one in zip(times, found, strict=True)]


def test_nothing_is_found_while_every_job_moves() -> None:
    assert Pipeline().run(3600, moving="ab") == []


def test_a_pipeline_that_takes_no_step_is_replayed_then_restarted() -> None:
    found = Pipeline().run(4 * STILL_S, stepping=False)

    assert [remedy for _, remedy, _ in found] == ["replay", "restart", "restart"]
    assert [job for *_, job in found] == ["", "", ""]
    assert found[0][0] >= STILL_S


def test_a_slow_pipeline_has_fifty_steps_of_time() -> None:
    pipeline = Pipeline(step_s=10.0)

    assert pipeline.run(STILL_STEPS * 10.0 - PERIOD_S, stepping=False) == []
    assert pipeline.run(3 * PERIOD_S, stepping=False) != []


def test_a_step_that_is_computed_is_waited_for_however_slowly() -> None:
    pipeline = Pipeline(step_s=0.0, computing=True)

    assert pipeline.run(3600, stepping=False) == []
    pipeline.computing = False
    assert pipeline.run(STILL_S, stepping=False) == [(3600 + STILL_S, "replay", "")]


def test_a_job_that_the_pipeline_does_not_hold_is_asked_for_during_a_long_step() -> None:
    found = Pipeline(moved={"b": 1}, computing=True).run(UNHELD_S + PERIOD_S, stepping=False)

    assert [(remedy, job) for _, remedy, job in found] == [("ask", "a")]


def test_a_job_that_stands_still_is_found_while_others_compute() -> None:
    found = Pipeline(computing=True).run(STILL_S + PERIOD_S, moving="b")

    assert found == [(STILL_S + PERIOD_S, "replay", "a")]


def test_a_step_ends_the_alarm() -> None:
    pipeline = Pipeline()
    pipeline.run(STILL_S - 2 * PERIOD_S, stepping=False)
    pipeline.run(PERIOD_S, moving="ab")

    assert pipeline.run(STILL_S - 2 * PERIOD_S, stepping=False) == []


def test_an_idle_pipeline_needs_no_help() -> None:
    pipeline = Pipeline(moved={}, expected=())

    assert pipeline.run(3600, stepping=False) == []


def test_a_job_that_stands_still_beside_others_is_replayed_then_ended_then_abandoned() -> None:
    found = Pipeline().run(3.5 * STILL_S, moving="b")

    assert [(remedy, job) for _, remedy, job in found] == [("replay", "a"), ("end", "a"), ("abandon", "a")]


def test_a_job_that_waits_for_room_is_left_alone() -> None:
    assert Pipeline(no_room=frozenset("a")).run(3600, moving="b") == []


def test_a_job_that_the_pipeline_does_not_hold_is_asked_for() -> None:
    pipeline = Pipeline(moved={"b": 1})

    assert {(remedy, job) for _, remedy, job in pipeline.run(60, moving="b")} == {("ask", "a")}


def test_a_job_that_has_just_ended_is_not_asked_for() -> None:
    pipeline = Pipeline()
    pipeline.run(60, moving="ab")
    pipeline.moved = {"b": 1}
    assert pipeline.run(2 * PERIOD_S, moving="b") == []
    pipeline.expected = ("b",)

    assert pipeline.run(60, moving="b") == []


def test_a_job_without_a_token_for_its_budget_is_abandoned_while_its_pipeline_is_repaired() -> None:
    pipeline = Pipeline()
    pipeline.run(20, moving="ab")
    pipeline.repaired = True

    assert pipeline.run(BUDGET_S - 2 * PERIOD_S) == []
    assert {(remedy, job) for _, remedy, job in pipeline.run(PERIOD_S * 2)} == {
        ("abandon", "a"),
        ("abandon", "b"),
    }


def test_the_time_of_a_repair_does_not_count_as_standing_still() -> None:
    pipeline = Pipeline()
    pipeline.run(STILL_S - 2 * PERIOD_S, stepping=False)
    pipeline.repaired = True
    pipeline.run(STILL_S)
    pipeline.repaired = False

    assert pipeline.run(STILL_S - 2 * PERIOD_S, stepping=False) == []


def test_the_time_in_which_the_watchdog_did_not_look_does_not_count() -> None:
    pipeline = Pipeline()
    pipeline.run(20, stepping=False)
    pipeline.now_s += 3600

    assert pipeline.run(20, stepping=False) == []


def test_every_remedy_is_used() -> None:
    assert {one.value for one in Remedy} == {"ask", "replay", "restart", "end", "abandon"}


class Standing(OwnPipeline):
    """A deployment that says what its pipeline does, and notes how it is helped."""

    def __init__(self) -> None:
        self.structure = structure(1)
        self.phase: JobPhase | None = None
        self.seen: PipelineLook | None = PipelineLook(0, 0.0, {"job-1": 1})
        self.helped: list[str] = []
        self.runs: list[asyncio.Future[JobRun]] = []
        self.is_away = False
        self.is_silent = False

    async def run(self, wanted: Job) -> JobRun:
        self.runs.append(asyncio.get_running_loop().create_future())
        return await self.runs[-1]

    async def look(self) -> PipelineLook | None:
        if self.is_silent:
            raise InternalError("it does not say what it does")
        return self.seen

    async def end(self, job_id: str, error: AzuError) -> None:
        if self.is_away:
            raise WorkerLost("the pipeline is gone")
        self.runs[-1].set_result(JobRun(3, FinishReason.ERROR, error=error))

    async def cancel(self, job_id: str) -> None:
        self.helped.append("cancel")

    def pipeline_lost(self) -> None:
        self.helped.append("replay")

    def restart_pipeline(self) -> None:
        self.helped.append("restart")


@dataclass
class Watched:
    """One job in a deployment that a watch looks at every two seconds, until it has ended."""

    deployment: Standing = field(default_factory=Standing)
    patience: RetryPolicy = field(default_factory=lambda: RetryPolicy(1, 8, BUDGET_S))
    now_s: float = 0.0
    steps: bool = True

    async def ended(self, seconds: float) -> JobRun | None:
        one = RunningJob(replace(job(), job_id="job-1", created_at_ms=0), self.deployment)
        running = asyncio.ensure_future(one.run())
        watch = ProgressWatch(
            {"job-1": one}, self.patience, clock=lambda: self.now_s, now_ms=lambda: round(self.now_s * 1000)
        )
        for step in range(round(seconds / PERIOD_S)):
            await asyncio.sleep(0)
            self.now_s += PERIOD_S
            if self.deployment.seen is not None and self.steps:
                self.deployment.seen = replace(self.deployment.seen, num_completed=step)
            await watch.look()
            for _ in range(5):
                await asyncio.sleep(0)
            if running.done():
                return running.result()
        running.cancel()
        return None


def test_a_pipeline_that_lives_and_does_nothing_is_restarted() -> None:
    watched = Watched(steps=False)

    assert asyncio.run(watched.ended(2.5 * STILL_S)) is None
    assert watched.deployment.helped == ["replay", "restart"]


def test_a_job_that_stands_still_ends_with_an_error_and_what_was_delivered() -> None:
    run = asyncio.run(Watched().ended(3 * STILL_S))

    assert run is not None
    assert run.completion_tokens == 3
    assert isinstance(run.error, InternalError)


def test_a_job_that_even_its_pipeline_cannot_end_is_waited_for_no_longer() -> None:
    watched = Watched()
    watched.deployment.is_away = True
    run = asyncio.run(watched.ended(3 * STILL_S))

    assert run is not None
    assert (run.completion_tokens, run.finish_reason) == (0, FinishReason.ERROR)


def test_a_job_is_where_its_pipeline_says_or_its_model_while_that_is_repaired_and_then_forgotten() -> None:
    recovering = JobPhase("recovering", "2 of 3 parts are up.", 2, 3)

    async def look() -> list[JobPhase | None]:
        deployment = Standing()
        deployment.seen = PipelineLook(0, 0.0, {"job-1": 1}, phases={"job-1": queued(3)})
        one = RunningJob(replace(job(), job_id="job-1", created_at_ms=0), deployment)
        running = {"job-1": one}
        watch = ProgressWatch(running, RetryPolicy(1, 8, BUDGET_S), now_ms=lambda: 0)
        await watch.look()
        phases = [watch.phases()["job-1"]]
        deployment.phase = recovering
        phases.append(watch.phases()["job-1"])
        deployment.phase = None
        del running["job-1"]
        await watch.look()
        running["job-1"] = one
        return [*phases, watch.phases()["job-1"]]

    assert asyncio.run(look()) == [queued(3), recovering, None]


def test_a_deployment_says_once_where_it_stands_however_many_jobs_it_has() -> None:
    asked = []

    class Large(Standing):
        @property
        def phase(self) -> JobPhase:
            asked.append(self)
            return queued(len(asked))

        @phase.setter
        def phase(self, _: object) -> None:
            """It stands where it says."""

    two = Large(), Large()
    running = {str(number): RunningJob(job(), two[number % 2]) for number in range(10)}
    watch = ProgressWatch(running, RetryPolicy(1, 8, BUDGET_S))

    assert set(watch.phases().values()) == {queued(1), queued(2)}
    assert len(asked) == 2


def test_a_job_that_its_pipeline_does_not_hold_is_asked_for_again() -> None:
    watched = Watched()
    watched.deployment.seen = PipelineLook(0, 0.0, {})
    asyncio.run(watched.ended(UNHELD_S + 2 * PERIOD_S))

    assert len(watched.deployment.runs) == 2


def test_a_repair_that_takes_too_long_ends_the_job_with_an_error() -> None:
    watched = Watched()
    watched.deployment.seen = None
    run = asyncio.run(watched.ended(2 * BUDGET_S))

    assert run is not None
    assert isinstance(run.error, Unavailable)
    assert watched.now_s <= BUDGET_S + 2 * PERIOD_S
    assert watched.deployment.helped == ["cancel"]


def test_a_job_that_has_used_up_its_time_ends_with_an_error() -> None:
    run = asyncio.run(Watched(patience=RetryPolicy(1, 8, BUDGET_S, job_s=30)).ended(60))

    assert run is not None
    assert run.error is not None
    assert run.error.code == "deadline_exceeded"


def test_a_pipeline_that_does_not_say_what_it_does_is_restarted_and_its_old_jobs_end() -> None:
    watched = Watched(patience=RetryPolicy(1, 8, BUDGET_S, job_s=round(2.5 * STILL_S)))
    watched.deployment.is_silent = True

    run = asyncio.run(watched.ended(3 * STILL_S))

    assert watched.deployment.helped == ["restart", "restart"]
    assert run is not None
    assert run.error is not None
    assert run.error.code == "deadline_exceeded"
