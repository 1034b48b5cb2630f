"""The OpenAI endpoints: a prompt in, the job's tokens out, whole or as they come."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse

from azu.auth.keys import ApiKey
from azu.errors import AzuError, InternalError, Unavailable
from azu.protocol.job import Job, JobOutcome, JobState, TokenEvent
from deployments.accounts import Key, ServicesNow
from deployments.openai import Answer, ChatRequest, CompletionRequest, usage
from deployments.sampling import sampling_params
from deployments.services import ServedModel, Services

router = APIRouter()

# OpenAI's clients retry 5xx by themselves; once something was charged they must not.
_NO_RETRY = {"x-should-retry": "false"}


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


async def _answer(
    services: Services, key: ApiKey, model: ServedModel, prompt: tuple[int, ...],
    body: ChatRequest | CompletionRequest, *, chat: bool,
) -> Response:  # fmt: skip
    limit = services.intake.completion_limit(model.facts, len(prompt))
    sampling = sampling_params(body, model, default_max_tokens=limit)
    job = await services.intake.accept(key, model.facts, prompt, sampling)
    answer = Answer(chat=chat, job_id=job.job_id, model=body.model, created_s=int(time.time()))
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        pieces = _stream(services, job, model, answer, include_usage=include_usage)
        return StreamingResponse(
            pieces, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
    return await _whole(services, job, model, answer)


async def follow(
    services: Services, job: Job, model: ServedModel
) -> AsyncIterator[tuple[str, JobOutcome | None]]:
    """Yield a job's text in pieces, at last with its outcome; a reader that goes away cancels the job."""
    text = model.tokenizer.stream(job.prompt_token_ids)
    ended = False
    try:
        async for event in services.jobs.events(job.job_id):
            if isinstance(event, TokenEvent):
                if piece := text.push(event.token_ids):
                    yield piece, None
            else:
                ended = True
                yield text.finish(), event
    finally:
        if not ended:
            await asyncio.shield(services.jobs.cancel(job.job_id))


async def _whole(services: Services, job: Job, model: ServedModel, answer: Answer) -> Response:
    text, outcome = "", None
    async for piece, outcome in follow(services, job, model):  # noqa: B007
        text += piece
    if outcome is None:
        raise InternalError(f"{job.job_id} ended without an outcome")
    if outcome.state is JobState.FAILED:
        error = _error_of(outcome)
        headers = _NO_RETRY if outcome.receipt.charged_lamports else None
        return JSONResponse(error.to_openai(), error.status, headers=headers)
    return JSONResponse(answer.whole(text, outcome.finish_reason, _usage(job, outcome)))


async def _stream(
    services: Services, job: Job, model: ServedModel, answer: Answer, *, include_usage: bool
) -> AsyncIterator[str]:
    if opening := answer.opening():
        yield _event(opening)
    async for piece, outcome in follow(services, job, model):
        if piece:
            yield _event(answer.piece(piece))
        if outcome is None:
            continue
        if outcome.state is JobState.FAILED:
            yield _event(_error_of(outcome).to_openai())
        else:
            yield _event(answer.closing(outcome.finish_reason))
            if include_usage:
                yield _event(answer.usage_chunk(_usage(job, outcome)))
    yield "data: [DONE]\n\n"


def _usage(job: Job, outcome: JobOutcome) -> dict[str, int]:
    return usage(len(job.prompt_token_ids), outcome.receipt.completion_tokens, outcome.receipt)


def _error_of(outcome: JobOutcome) -> AzuError:
    said = outcome.error or {}
    return Unavailable(str(said.get("message")), param=said.get("param"), code=said.get("code"))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
