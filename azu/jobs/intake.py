"""From a checked prompt to a queued job: check the sizes, reserve the highest price, write the job."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from azu.auth.key_records import ApiKey
from azu.errors import (
    AzuError,
    InsufficientBalance,
    InternalError,
    InvalidRequest,
    RateLimited,
    Unavailable,
)
from azu.jobs.departures import Departures, Reader
from azu.jobs.draining import Draining
from azu.jobs.in_flight_limit import InFlightLimit
from azu.jobs.redis import RedisJobs
from azu.metrics import PROMPT_TOKENS, SEQUENCES, TIME_PER_TOKEN, TIME_TO_FIRST_TOKEN, MetricsSnapshot
from azu.money.books import Books
from azu.money.pricing import charge, max_charge
from azu.protocol.job import Job, JobState
from azu.protocol.sampling import SamplingParams
from azu.redis_client import FIRST_PAUSE_S, retry_until_available
from azu.supervision import as_known_error

log = logging.getLogger(__name__)

# How long a job may take to end that waited for its client, and how often its state is read.
_END_S, _LOOK_S = 3.0, 0.02


@dataclass(frozen=True, slots=True)
class JobLimits:
    """The sizes that one job may have."""

    max_prompt_tokens: int
    max_completion_tokens: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts of a model that the price and the limits of a job depend on."""

    model_id: str
    revision: str
    num_layers: int
    context_length: int


@dataclass(frozen=True, slots=True)
class Quote:
    """The price of a job: at most, and for the expected number of tokens, both of each choice."""

    prompt_tokens: int
    max_tokens: int
    expected_tokens: int
    lamports_per_token_layer: int
    max_lamports: int
    expected_lamports: int


def check_wait(
    measured: MetricsSnapshot,
    model_id: str,
    num_prompt: int,
    num_tokens: int,
    *,
    load_s: float,
    max_wait_s: float,
) -> None:
    """Raise Unavailable where a caller would wait longer than `max_wait_s` for a whole answer.

    The answer's `num_tokens` are expected to come as fast as those that were measured, and the first one
    later by as much as the prompt is longer; without a measurement they take no time. Sequences that wait
    already come first, each in the place of one that runs. `load_s` is the time until the model runs.
    """
    steps = measured.histogram(TIME_PER_TOKEN, model_id)
    firsts = measured.histogram(TIME_TO_FIRST_TOKEN, model_id)
    prompts = measured.value(PROMPT_TOKENS, model_id) / max(1, firsts.count)
    first_s = firsts.sum / max(1, firsts.count) * max(1.0, num_prompt / max(1.0, prompts))
    own_s = first_s + num_tokens * steps.sum / max(1, steps.count)
    running, waiting = (measured.value(SEQUENCES, model_id, state) for state in ("running", "waiting"))
    wait_s = load_s + own_s * (1 + waiting / max(1.0, running))
    if wait_s > max_wait_s:
        raise Unavailable(
            f"this answer would take about {wait_s:.0f} s, and a whole one may take {max_wait_s:.0f} s here; "
            "ask for it with stream=true, or send the prompt to /submit",
            code="answer_takes_too_long",
            retry_after_s=wait_s,
        )


class Intake:
    """Turns prompts into durable jobs whose highest price is reserved."""

    def __init__(
        self,
        books: Books,
        jobs: RedisJobs,
        in_flight_limit: InFlightLimit,
        limits: JobLimits,
        departures: Departures,
        draining: Draining,
        *,
        now_ms: Callable[[], int],
        new_job_id: Callable[[], str],
    ) -> None:
        self._books = books
        self._jobs = jobs
        self._in_flight_limit = in_flight_limit
        self._limits = limits
        self.departures = departures
        self._draining = draining
        self._now_ms = now_ms
        self._new_job_id = new_job_id
        self._going_on: set[asyncio.Task[None]] = set()

    def completion_limit(self, model: ModelFacts, num_prompt_tokens: int) -> int:
        """Return the largest `max_tokens` of a job whose prompt has that many tokens."""
        return min(self._limits.max_completion_tokens, model.context_length - num_prompt_tokens)

    async def accept(
        self,
        key: ApiKey,
        bearer: str,
        model: ModelFacts,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        choices: int = 1,
        *,
        asked: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Job:
        """Reserve the highest price of a job with `choices` answers, and queue the job for the key's owner.

        `bearer` is the key's secret, which the books check. `asked` names the request whose connection waits
        for the job, `tools` are those that the prompt offers. Where the job needs their money or their
        places, the address's jobs that wait for their clients end first. Raises InvalidRequest for sizes out
        of range, RateLimited for a key with too many jobs in flight, Unauthenticated for an expired key, and
        InsufficientBalance when the balance or the key's spend limit is too low; then nothing has changed.
        The reservation comes first, so that every written job can be paid. Raises Unavailable while Redis or
        the books are away, or where the network is about to stop. What was written of the job is taken back
        later then, and after any error that is no refusal.
        """
        self.check_sizes(model, len(prompt_token_ids), sampling.max_tokens)
        await self._draining.check()
        now_ms = self._now_ms()
        job_id = self._new_job_id()
        reserve = partial(
            self._books.reserve,
            bearer,
            job_id,
            model_id=model.model_id,
            revision=model.revision,
            num_layers=model.num_layers,
            prompt_tokens=len(prompt_token_ids),
            max_tokens=choices * sampling.max_tokens,
        )
        try:
            try:
                await self._in_flight_limit.add(key, job_id, now_ms)
                reserved_lamports = await reserve()
            except (InsufficientBalance, RateLimited):
                if not await self._end_waiting(key.address):
                    raise
                await self._in_flight_limit.add(key, job_id, now_ms)
                reserved_lamports = await reserve()
            job = Job(
                job_id=job_id,
                address=key.address,
                model_id=model.model_id,
                revision=model.revision,
                num_layers=model.num_layers,
                prompt_token_ids=prompt_token_ids,
                sampling=sampling,
                reserved_lamports=reserved_lamports,
                created_at_ms=now_ms,
                choices=choices,
                key_id=key.key_id,
            )
            await self._jobs.submit(job, asked, self.departures.ingress, tools)
        except Exception as error:
            if isinstance(error, AzuError) and not isinstance(error, Unavailable | InternalError):
                await self._in_flight_limit.remove(key, job_id)  # nothing was reserved
            else:
                self._go_on(self._take_back(key, job_id))
            raise
        log.info("accepted", extra=_log_fields(job, key))
        return job

    async def _end_waiting(self, address: str) -> bool:
        """End the jobs of an address that wait for their clients; say whether there were any."""
        job_ids = await self.departures.waiting(address)
        for job_id in job_ids:
            await self._jobs.cancel(job_id, client_left=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                while set(await self._jobs.states(job_ids)) & {JobState.QUEUED, JobState.RUNNING}:
                    await asyncio.sleep(_LOOK_S)
        return bool(job_ids)

    async def quote(
        self,
        model: ModelFacts,
        num_prompt_tokens: int,
        max_tokens: int,
        expected_tokens: int | None,
        choices: int = 1,
    ) -> Quote:
        """Return the price of a job; `expected_tokens` of each choice default to `max_tokens`.

        Raises InvalidRequest for sizes that `accept` refuses.
        """
        self.check_sizes(model, num_prompt_tokens, max_tokens)
        price = await self._books.price()
        expected = max_tokens if expected_tokens is None else min(expected_tokens, max_tokens)
        return Quote(
            prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens,
            expected_tokens=expected,
            lamports_per_token_layer=price,
            max_lamports=max_charge(num_prompt_tokens, choices * max_tokens, model.num_layers, price),
            expected_lamports=charge(num_prompt_tokens, choices * expected, model.num_layers, price),
        )

    async def cancel(self, job_id: str) -> None:
        """End a job that azu cannot answer; while Redis is away, as soon as it is back."""
        await self._now_or_later(partial(self._jobs.cancel, job_id))

    async def leave(self, reader: Reader) -> None:
        """Note that a client left, which pays for what ran; while Redis is away, as soon as it is back."""
        await self._now_or_later(partial(self.departures.leave, reader))

    async def answered(self, reader: Reader) -> None:
        """Note that a client has its whole answer; while Redis is away, as soon as it is back."""
        await self._now_or_later(partial(self.departures.answered, reader))

    async def _now_or_later(self, note: Callable[[], Awaitable[None]]) -> None:
        try:
            await note()
        except Unavailable:
            # A pipeline goes on as soon as Redis is back: what runs until this is noted is paid.
            self._go_on(retry_until_available(note, longest_pause_s=FIRST_PAUSE_S))
        except Exception as error:
            _tell(error)  # the answer is there: its caller gets it

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_outlive(work))
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)

    async def _take_back(self, key: ApiKey, job_id: str) -> None:
        """Once Redis is back, have a job whose caller got an error never run, or end if it was written."""
        if await retry_until_available(partial(self._jobs.give_up, job_id)):
            await retry_until_available(partial(self._in_flight_limit.remove, key, job_id))
            await retry_until_available(partial(self._books.give_back, job_id))
        else:
            await retry_until_available(partial(self._jobs.cancel, job_id))

    def check_sizes(self, model: ModelFacts, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise InvalidRequest for a prompt or a number of new tokens that `accept` refuses."""
        if num_prompt_tokens == 0:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if num_prompt_tokens > self._limits.max_prompt_tokens or num_prompt_tokens >= model.context_length:
            limit = min(self._limits.max_prompt_tokens, model.context_length - 1)
            raise InvalidRequest(
                f"the prompt has {num_prompt_tokens} tokens; {model.model_id} takes at most {limit} here",
                param="prompt",
                code="context_length_exceeded",
            )
        limit = self.completion_limit(model, num_prompt_tokens)
        if not 1 <= max_tokens <= limit:
            raise InvalidRequest(
                f"max_tokens is {max_tokens}; after this prompt it may be 1 to {limit}",
                param="max_tokens",
            )


async def _outlive(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception as error:
        _tell(error)


def _tell(error: Exception) -> None:
    known = as_known_error(error, "a note on a job")
    log.error("what became of a request is not noted: %s", known.message)


def _log_fields(job: Job, key: ApiKey) -> dict[str, object]:
    return {
        "job_id": job.job_id,
        "model_id": job.model_id,
        "key_id": key.key_id,
        "prompt_tokens": len(job.prompt_token_ids),
        "max_tokens": job.sampling.max_tokens,
        "reserved_lamports": job.reserved_lamports,
    }
