"""An answer that would take too long is refused; that a client left is noted soon after Redis is back."""

import asyncio

import pytest

from azu.errors import Unavailable
from azu.jobs.departures import Departures, Reader
from azu.jobs.intake import check_wait
from azu.metrics import PROMPT_TOKENS, SEQUENCES, TIME_PER_TOKEN, TIME_TO_FIRST_TOKEN, Meter
from tests.jobs.outages import away_for
from tests.jobs.test_settlement import ADDRESS, Billing

MODEL = "azu/tiny-dense"


def measured(*, running: int = 1, waiting: int = 0) -> Meter:
    """Two answers came after 2 s each to 100 tokens of a prompt, then a token each half second."""
    meter = Meter()
    for _ in range(2):
        meter.count(PROMPT_TOKENS, 100, MODEL)
        meter.observe(TIME_TO_FIRST_TOKEN, 2.0, MODEL)
        meter.observe(TIME_PER_TOKEN, 0.5, MODEL)
    meter.observe(TIME_PER_TOKEN, 99.0, "another")
    meter.set_gauge(SEQUENCES, {(MODEL, "running"): running, (MODEL, "waiting"): waiting})
    return meter


@pytest.mark.parametrize(
    ("meter", "num_prompt", "num_tokens", "load_s", "wait_s"),
    [
        (measured(), 100, 100, 0.0, 52),
        (measured(), 1000, 100, 0.0, 70),  # ten times the prompt
        (measured(), 5, 100, 30.0, 82),
        (measured(running=4, waiting=2), 100, 100, 0.0, 78),
        (measured(running=0, waiting=1), 100, 100, 0.0, 104),
        (Meter(), 100, 10**6, 0.0, 0),  # nothing is known
        (Meter(), 100, 1, 90.0, 90),
    ],
)
def test_the_wait_is_predicted_from_the_queue_the_sizes_and_the_measured_pace(
    meter: Meter, num_prompt: int, num_tokens: int, load_s: float, wait_s: int
) -> None:
    def check(max_wait_s: float) -> None:
        check_wait(meter.snapshot(), MODEL, num_prompt, num_tokens, load_s=load_s, max_wait_s=max_wait_s)

    check(wait_s + 0.5)
    if wait_s:
        with pytest.raises(Unavailable, match=f"about {wait_s} s.*stream=true.*/submit") as refused:
            check(wait_s - 0.5)
        assert refused.value.retry_after_s == wait_s


def test_while_redis_is_away_what_ends_a_job_is_noted_after_pauses_that_stay_short(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000)
        intake, job = billing.intake, await billing.accept()
        pauses_s = away_for(7, intake.departures, "leave", monkeypatch)
        await intake.leave(Reader(job.job_id, ADDRESS, ""))
        await asyncio.gather(*intake._going_on)
        assert pauses_s == [0.1] * 6

        monkeypatch.undo()
        pauses_s = away_for(7, billing.jobs, "cancel", monkeypatch)
        await intake.cancel(job.job_id)
        await asyncio.gather(*intake._going_on)
        assert pauses_s == [0.1] * 6
        record = await billing.jobs.get(job.job_id)
        assert record is not None
        assert record.cancelled

    asyncio.run(scenario())


def test_a_note_that_fails_costs_no_caller_its_answer_and_is_told(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_calls = 0

    async def fails(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1
        raise Unavailable("away") if num_calls == 1 else ZeroDivisionError

    async def scenario() -> None:
        intake = Billing(redis_url).intake
        monkeypatch.setattr(Departures, "answered", fails)
        for told in (1, 2):
            await intake.answered(Reader("job-1", ADDRESS, ""))  # the first fails behind its caller's back
            await asyncio.gather(*intake._going_on)
            assert caplog.text.count("is not noted: azu made a mistake") == told

    asyncio.run(scenario())
