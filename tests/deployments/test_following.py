"""A job's tokens become its choices' texts, whatever way they come."""

import asyncio
from pathlib import Path

import pytest

from azu.engine.tokenizer import Tokenizer
from azu.jobs.redis import RedisJobs
from azu.protocol.job import FinishReason, Job, JobOutcome, JobState, Receipt, TokenEvent
from azu.protocol.sampling import SamplingParams
from deployments.answers import Part
from deployments.following import follow
from tests import builders

FOLDER = Path(__file__).parents[2] / "configs" / "models" / "tiny-dense"
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(FOLDER)


def outcome(job: Job, state: JobState, reason: FinishReason) -> JobOutcome:
    receipt = Receipt(
        job_id=job.job_id, address=job.address, model_id=job.model_id, revision=job.revision, prompt_tokens=4,
        completion_tokens=1, num_layers=4, lamports_per_token_layer=2, charged_lamports=0,
        released_lamports=0, platform_lamports=0, worker_lamports={}, transfer_id="t",
    )  # fmt: skip
    return JobOutcome(state, reason, receipt)


def followed(
    redis_url: str, tokenizer: Tokenizer, job: Job, events: list[TokenEvent], end: JobOutcome, after: int = 0
) -> list[Part | JobOutcome]:
    async def play() -> list[Part | JobOutcome]:
        jobs = RedisJobs.from_url(redis_url)
        await jobs.submit(job)
        for event in events:
            await jobs.append([(job.job_id, event)])
        await jobs.finish(job.job_id, end)
        return [part async for part in follow(jobs, job, tokenizer, after)]

    return asyncio.run(asyncio.wait_for(play(), 20))


def texts(parts: list[Part | JobOutcome], num_choices: int = 1) -> list[str]:
    found = [part for part in parts if isinstance(part, Part)]
    return ["".join(part.text for part in found if part.choice == n) for n in range(num_choices)]


def scored(parts: list[Part | JobOutcome]) -> list[float]:
    return sorted(score.logprob for part in parts if isinstance(part, Part) for score in part.scores)


def test_the_choices_of_a_job_are_told_apart(redis_url: str, tokenizer: Tokenizer) -> None:
    job = builders.job(choices=2)
    one, two = tokenizer.encode("one 😀"), tokenizer.encode("two 漢字")
    events, index = [], 0
    for position in range(max(len(one), len(two))):
        for choice, ids in enumerate((one, two)):
            if position < len(ids):
                reason = (STOP, LENGTH)[choice] if position == len(ids) - 1 else None
                events.append(TokenEvent(index, (ids[position],), choice=choice, finish_reason=reason))
                index += 1

    parts = followed(redis_url, tokenizer, job, events, end := outcome(job, JobState.DONE, LENGTH))

    assert [text.strip() for text in texts(parts, 2)] == ["one 😀", "two 漢字"]
    reasons = {
        part.choice: part.finish_reason for part in parts if isinstance(part, Part) and part.finish_reason
    }
    assert reasons == {0: STOP, 1: LENGTH}
    assert parts[-1] == end


def test_whoever_comes_back_gets_what_was_not_shown_and_nothing_twice(
    redis_url: str, tokenizer: Tokenizer
) -> None:
    job = builders.job(choices=2, sampling=SamplingParams(max_tokens=50, stop=("漢字!", "😀😀"), logprobs=0))
    written = [tokenizer.encode(text) for text in ("one 漢字 😀 漢", "two 😀 and 漢字!")]
    events: list[TokenEvent] = []
    for choice, ids in ((0, written[0][:3]), (1, written[1][:-1]), (0, written[0][3:]), (1, written[1][-1:])):
        reason = STOP if len(events) >= 2 else None
        index = sum(len(event.token_ids) for event in events)
        scores = tuple(-float(index + n) for n in range(len(ids)))
        top = tuple(() for _ in ids)
        events.append(TokenEvent(index, tuple(ids), scores, top, choice, reason))
    parts = followed(redis_url, tokenizer, job, events, end := outcome(job, JobState.DONE, STOP))

    for seen in {part.after for part in parts if isinstance(part, Part)} | {0}:
        shown = [part for part in parts if isinstance(part, Part) and part.after <= seen]

        again = followed(redis_url, tokenizer, job, events, end, after=seen)

        assert again[-1] == end
        assert [a + b for a, b in zip(texts(shown, 2), texts(again, 2), strict=True)] == texts(parts, 2)
        assert scored([*shown, *again]) == scored(parts)
        assert {
            part.choice for part in [*shown, *again] if isinstance(part, Part) and part.finish_reason
        } == {0, 1}
    assert texts(parts, 2) == ["one 漢字 😀 漢", "two 😀 and "]


def test_a_stop_string_is_never_shown_and_neither_are_its_tokens(
    redis_url: str, tokenizer: Tokenizer
) -> None:
    job = builders.job(sampling=SamplingParams(max_tokens=50, stop=("capital of",), logprobs=1))
    ids = tuple(tokenizer.encode("the capital of"))
    logprobs = tuple(-float(n) for n in range(len(ids)))
    top = tuple(((token, logprob),) for token, logprob in zip(ids, logprobs, strict=True))
    events = [
        TokenEvent(
            n,
            ids[n : n + 1],
            logprobs[n : n + 1],
            top[n : n + 1],
            finish_reason=STOP if n == len(ids) - 1 else None,
        )
        for n in range(len(ids))
    ]

    parts = followed(redis_url, tokenizer, job, events, outcome(job, JobState.DONE, STOP))

    assert texts(parts)[0].strip() == "the"
    shown = [score for part in parts if isinstance(part, Part) for score in part.scores]
    assert [score.logprob for score in shown] == list(logprobs[: len(shown)])
    assert 0 < len(shown) < len(ids)
    assert "capital" not in "".join(tokenizer.token_text(score.token_id) for score in shown)


def test_a_choice_that_was_cut_off_shows_what_it_has(redis_url: str, tokenizer: Tokenizer) -> None:
    job = builders.job(sampling=SamplingParams(max_tokens=50, stop=("two three",)))
    event = TokenEvent(0, tuple(tokenizer.encode("one two")))

    parts = followed(
        redis_url, tokenizer, job, [event], outcome(job, JobState.CANCELLED, FinishReason.CANCELLED)
    )

    assert texts(parts)[0].strip() == "one two"


def test_a_job_that_failed_ends_with_its_outcome_alone(redis_url: str, tokenizer: Tokenizer) -> None:
    job = builders.job()
    end = outcome(job, JobState.FAILED, FinishReason.ERROR)

    parts = followed(redis_url, tokenizer, job, [TokenEvent(0, tuple(tokenizer.encode("one")))], end)

    assert not any(isinstance(part, Part) and part.finish_reason for part in parts)
    assert parts[-1] == end
