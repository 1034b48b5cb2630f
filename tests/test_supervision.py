"""A loop outlives every exception; one that cannot go on has its process replaced."""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from azu.errors import AzuError, InvalidRequest, LedgerError, Unavailable, WorkerLost
from azu.logs import log_context
from azu.metrics import FAULTS, UNHEALTHY, Meter
from azu.supervision import FAULTS_IN_A_ROW, SHOWN_S, STEADY_S, Supervisor, as_known_error
from tests.logged import Lines, logged

OK = None
BUG = ZeroDivisionError("division by zero")


class Life:
    """A process with one loop whose steps are scripted; it is cancelled after the last step."""

    def __init__(self, *outcomes: Exception | None, step_s: float = 0.0, every_s: float = 0.0) -> None:
        self.outcomes = iter(outcomes)
        self.step_s, self.every_s = step_s, every_s
        self.now_s = 0.0
        self.slept_s: list[float] = []
        self.replaced_at: list[int] = []
        self.taken = 0
        self.meter = Meter()
        self.supervisor = Supervisor(
            "treasury", self.meter, self.replace, chance=random.Random(1),
            clock=lambda: self.now_s, sleep=self.sleep,
        )  # fmt: skip

    def replace(self) -> None:
        self.replaced_at.append(self.taken)

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)

    async def step(self) -> None:
        self.now_s += self.step_s
        outcome = next(self.outcomes, asyncio.CancelledError())
        self.taken += 1
        if outcome is not None:
            raise outcome

    def live(self) -> "Life":
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(self.supervisor.keep("payouts", self.step, every_s=self.every_s))
        return self

    @property
    def faults(self) -> float:
        return self.meter.snapshot().value(FAULTS, "treasury", "payouts")


@pytest.fixture
def lines() -> Iterator[Lines]:
    with logged() as lines:
        yield lines


def test_a_loop_goes_on_after_any_exception_and_counts_it() -> None:
    for error in (BUG, AssertionError(), KeyError("x"), LedgerError("refused"), InvalidRequest("odd")):
        life = Life(error, OK, OK).live()

        assert (life.taken, life.faults, life.replaced_at) == (4, 1, [])
        assert life.supervisor.is_healthy


def test_the_fifth_fault_in_a_row_has_the_process_replaced_once_it_was_shown() -> None:
    life = Life(*[BUG] * FAULTS_IN_A_ROW)
    life.replace = lambda: life.replaced_at.append(len(life.slept_s))  # type: ignore[method-assign]
    life.supervisor = Supervisor("treasury", life.meter, life.replace, sleep=life.sleep)
    life.live()

    assert life.meter.snapshot().value(UNHEALTHY, "treasury") == 1
    assert not life.supervisor.is_healthy
    assert life.slept_s[4] == SHOWN_S
    assert life.replaced_at == [5]


def test_a_step_that_succeeds_or_runs_for_long_ends_the_row() -> None:
    assert Life(*[BUG] * 4, OK, *[BUG] * 4).live().replaced_at == []
    assert Life(*[BUG] * 20, step_s=STEADY_S).live().replaced_at == []
    assert Life(*[BUG] * 5, step_s=STEADY_S - 1).live().replaced_at == [5]


def test_another_service_that_is_away_is_no_fault() -> None:
    away: tuple[AzuError, ...] = (Unavailable("Redis did not answer"), WorkerLost("stage 1 is gone"))
    life = Life(*away * 20, OK).live()

    assert (life.taken, life.faults, life.replaced_at) == (42, 0, [])


def test_a_loop_outlives_any_outage_of_another_service() -> None:
    life = Life(*[Unavailable("the chain did not answer")] * 2000, OK).live()

    assert (life.taken, life.faults) == (2002, 0)
    assert max(life.slept_s) <= 2


def test_what_is_away_in_between_does_not_end_a_row() -> None:
    away = Unavailable("Redis did not answer")

    assert Life(BUG, away, BUG, away, BUG, away, BUG, away, BUG).live().replaced_at == [9]


def test_pauses_double_up_to_two_seconds_and_are_never_all_alike() -> None:
    life = Life(*[Unavailable("Redis did not answer")] * 8).live()

    for slept_s, most_s in zip(life.slept_s, (0.2, 0.4, 0.8, 1.6, 2, 2, 2, 2), strict=True):
        assert most_s / 2 <= slept_s <= most_s
    assert len(set(life.slept_s)) == 8


def test_a_loop_that_fails_never_takes_its_steps_more_often_than_its_period() -> None:
    assert min(Life(BUG, OK, BUG, every_s=30.0).live().slept_s) == 30.0


def test_a_fault_is_logged_with_its_trace_and_the_ids_of_where_it_was_raised(lines: Lines) -> None:
    life = Life(BUG, OK)

    async def step() -> None:
        with log_context(job_id="job-1"):
            await life.step()

    asyncio.run(life.supervisor.insist("payouts", step))

    assert lines()[0]["job_id"] == "job-1"
    assert "ZeroDivisionError" in lines()[0]["exception"]


def test_stop_ends_the_loops_and_nothing_is_taken_afterwards() -> None:
    async def live() -> int:
        supervisor = Supervisor("treasury", Meter(), lambda: None)
        taken = []

        async def step() -> None:
            taken.append(1)
            await asyncio.sleep(0)

        supervisor.start("one", step)
        supervisor.start("two", step)
        await asyncio.sleep(0.01)
        await supervisor.stop()
        before = len(taken)
        await asyncio.sleep(0.01)
        return len(taken) - before

    assert asyncio.run(live()) == 0


def test_a_loop_ends_though_a_library_swallowed_its_cancellation() -> None:
    async def live() -> None:
        reached = asyncio.Event()

        async def deaf() -> None:
            reached.set()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

        supervisor = Supervisor("treasury", Meter(), lambda: None)
        supervisor.start("one", deaf)
        await reached.wait()
        await asyncio.wait_for(supervisor.stop(), 5)

    asyncio.run(live())


def test_a_thread_outlives_exceptions_and_ends_with_its_last_step() -> None:
    outcomes = iter([BUG, True, BUG, False])
    ended = threading.Event()

    def step() -> bool:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        if not outcome:
            ended.set()
        return outcome

    life = Life()
    life.supervisor.start_thread("payouts", step)

    assert ended.wait(10)
    assert life.faults == 2


def test_an_unknown_exception_gets_an_id_that_the_log_has_too(lines: Lines) -> None:
    error = as_known_error(BUG, "a call of the registry")

    assert error.code == "internal_error"
    assert lines()[0]["fault_id"] in error.message
    assert "ZeroDivisionError" in lines()[0]["exception"]
    assert "ZeroDivisionError" not in error.message


def test_a_known_error_stays_as_it_is(lines: Lines) -> None:
    error = InvalidRequest("too long")

    assert as_known_error(error, "a call") is error
    assert lines() == []
