"""The OpenAI endpoints: a prompt in, the job's tokens out, whole or as they come."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from azu.auth.keys import ApiKey
from azu.errors import AzuError, InternalError, InvalidRequest, Unavailable
from azu.protocol.job import Job, JobOutcome, JobState
from deployments.accounts import Key, ServicesNow
from deployments.answers import Answer, Part, usage
from deployments.following import follow, joined
from deployments.jobs import owned
from deployments.openai import ChatRequest, CompletionRequest
from deployments.sampling import sampling_params
from deployments.services import ServedModel, Services

router = APIRouter()

# OpenAI's clients retry 5xx by themselves; once something was charged they must not.
_NO_RETRY = {"x-should-retry": "false"}
_NO_CACHE = {"cache-control": "no-cache"}


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, key: Key, services: ServicesNow) -> Response:
    """Answer a chat through the model's own template."""
    model = await services.model(body.model)
    messages = [message.for_template() for message in body.messages]
    prompt = await asyncio.to_thread(model.tokenizer.render_chat, messages)
    return await _answer(services, key, model, tuple(prompt), body, chat=True)


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, key: Key, services: ServicesNow) -> Response:
    """Continue a prompt as it is."""
    model = await services.model(body.model)
    prompt = await asyncio.to_thread(model.tokenizer.encode, body.prompt)
    return await _answer(services, key, model, tuple(prompt), body, chat=False)


@router.get("/v1/jobs/{job_id}/stream", response_model=None)
async def job_stream(
    job_id: str,
    key: Key,
    services: ServicesNow,
    after: Annotated[int, Query(ge=0)] = 0,
    chat: bool = False,
) -> Response:
    """Stream a job's answer from its completion token `after` on, as the chunks of a text or of a chat.

    Every chunk's `azu.after` says where to go on if no other arrives. Leaving does not end the job.
    """
    record = await owned(services, key, job_id)
    job = record.job
    if after > record.delivered:
        raise InvalidRequest(f"after is {after}; the job has {record.delivered} tokens so far", param="after")
    model = await services.model(job.model_id)
    answer = Answer(
        chat=chat, job_id=job_id, model=job.model_id, created_s=job.created_at_ms // 1000,
        decoder=model.tokenizer,
    )  # fmt: skip
    events = _events(services, job, model, answer, include_usage=True, after=after)
    return StreamingResponse(events, media_type="text/event-stream", headers=_NO_CACHE)


async def _answer(
    services: Services, key: ApiKey, model: ServedModel, prompt: tuple[int, ...],
    body: ChatRequest | CompletionRequest, *, chat: bool,
) -> Response:  # fmt: skip
    limit = services.intake.completion_limit(model.facts, len(prompt))
    sampling = sampling_params(body, model, default_max_tokens=limit)
    accepting = services.intake.accept(key, model.facts, prompt, sampling, body.n or 1)
    job = await _finished_or_given_up(services, asyncio.create_task(accepting))
    answer = Answer(
        chat=chat, job_id=job.job_id, model=body.model, created_s=int(time.time()), decoder=model.tokenizer
    )
    if not body.stream:
        return await _whole(services, job, model, answer)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return _JobStream(services, job, _events(services, job, model, answer, include_usage=include_usage))


async def _finished_or_given_up(services: Services, accepting: asyncio.Task[Job]) -> Job:
    """Let a job be accepted or refused in full, even if whoever asked for it is gone meanwhile."""
    try:
        return await asyncio.shield(accepting)
    except asyncio.CancelledError:
        job = await accepting
        await services.jobs.cancel(job.job_id)
        raise


@asynccontextmanager
async def _while_wanted(services: Services, job: Job) -> AsyncIterator[None]:
    """Cancel a job whose reader goes away; one that has ended stays as it is."""
    try:
        yield
    finally:
        await asyncio.shield(services.jobs.cancel(job.job_id))


class _JobStream(StreamingResponse):
    """A job's events as they come; whatever ends the response, even before its first byte, ends the job."""

    def __init__(self, services: Services, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_NO_CACHE)
        self._services = services
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _while_wanted(self._services, self._job):
            await super().__call__(scope, receive, send)


async def _whole(services: Services, job: Job, model: ServedModel, answer: Answer) -> Response:
    choices = [Part(index) for index in range(job.choices)]
    async with _while_wanted(services, job):
        async for part in follow(services.jobs, job, model.tokenizer):
            if isinstance(part, Part):
                choices[part.choice] = joined(choices[part.choice], part)
            elif part.state is JobState.FAILED:
                error = _error_of(part)
                headers = _NO_RETRY if part.receipt.charged_lamports else None
                return JSONResponse(error.to_openai(), error.status, headers=headers)
            else:
                return JSONResponse(answer.whole(choices, _usage(job, part)))
    raise InternalError(f"{job.job_id} ended without an outcome")


async def _events(
    services: Services, job: Job, model: ServedModel, answer: Answer, *, include_usage: bool, after: int = 0
) -> AsyncIterator[str]:
    for choice in range(0 if after else job.choices):
        if opening := answer.opening(choice):
            yield _event(opening)
    async for part in follow(services.jobs, job, model.tokenizer, after):
        if isinstance(part, Part):
            for chunk in answer.chunks(part):
                yield _event(chunk)
        elif part.state is not JobState.DONE:
            yield _event(_error_of(part).to_openai())
        elif include_usage:
            yield _event(answer.usage_chunk(_usage(job, part)))
    yield "data: [DONE]\n\n"


def _usage(job: Job, outcome: JobOutcome) -> dict[str, int]:
    return usage(len(job.prompt_token_ids), outcome.receipt.completion_tokens, outcome.receipt)


def _error_of(outcome: JobOutcome) -> AzuError:
    if outcome.state is JobState.CANCELLED:
        return Unavailable("whoever read this answer went away before its end", code="job_cancelled")
    said = outcome.error or {}
    return Unavailable(str(said.get("message")), param=said.get("param"), code=said.get("code"))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
