"""The OpenAI endpoints: a prompt becomes a job, and its tokens an answer, whole or as a stream."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from azu.api.base import ErrorBody, ResponseModel
from azu.api.openai import (
    JOB_ID_HEADER,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    StreamOptions,
    TextChunk,
    TextCompletion,
    Usage,
)
from azu.api.receipts import ReceiptLines
from azu.auth.key_records import ApiKey
from azu.auth.signatures import receipt_facts
from azu.engine.text import TextDelta
from azu.errors import (
    AzuError,
    HarmfulRequest,
    InternalError,
    InvalidRequest,
    NumericsError,
    Unavailable,
    error_classes,
)
from azu.jobs.departures import Reader, request_name
from azu.protocol.job import Job, JobOutcome, JobState
from azu.supervision import as_known_error
from deployments.answers import AnswerFormatter, follow, phase_line, usage_of
from deployments.middleware import refusal
from deployments.sampling import check_limits, check_tokens, max_tokens, sampling_params
from deployments.schema import stream_of, whole_or_stream
from deployments.services import AnsweredKey, Bearer, ServedModel, Services, ServicesNow, owned

if TYPE_CHECKING:
    from azu.engine.tokenizer import AnswerParser

router = APIRouter()
Deltas = AsyncIterator[TextDelta | JobOutcome]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=256)]

_NO_CACHE = {"cache-control": "no-cache"}
# A person gives up an answer of which nothing is heard for some seconds, a proxy often after 15 s.
_HELD_BACK_S = 2.0
_LOOK_S = 2.0
_SILENT_LOOKS = 2  # after which the same is said again
_SIGN_OF_LIFE = ": keep-alive\n\n"
# A whole answer to a request without max_tokens is expected to have so many.
_USUAL_TOKENS = 256
# Many clients take these three characters for the end of a line, as Python's splitlines does.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}


@router.post(
    "/v1/chat/completions", response_model=None, responses=whole_or_stream(ChatCompletion, ChatChunk)
)
async def chat_completions(
    body: ChatRequest,
    key: AnsweredKey,
    bearer: Bearer,
    services: ServicesNow,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Answer a chat through the model's own template.

    For a model that is new here a fee is set aside.
    """
    check_limits(body, services.config.policy.limits)
    model = await services.model(body.model, bearer)
    tools = body.offered_tools
    if tools and not model.tokenizer.takes_tools():
        raise InvalidRequest(
            f"the chat template of {body.model} does not support tools",
            param="tools",
            code="unsupported_parameter",
        )
    prompt = await services.render(model, body.messages, tools)
    return await _answer(services, key, bearer, model, tuple(prompt), body, tools, idempotency_key)


@router.post("/v1/completions", response_model=None, responses=whole_or_stream(TextCompletion, TextChunk))
async def completions(
    body: CompletionRequest,
    key: AnsweredKey,
    bearer: Bearer,
    services: ServicesNow,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Continue a prompt as it is.

    For a model that is new here a fee is set aside.
    """
    check_limits(body, services.config.policy.limits)
    model = await services.model(body.model, bearer)
    if isinstance(body.prompt, str):
        prompt = await services.encode(model, body.prompt)
    else:
        prompt = body.prompt
        check_tokens("prompt", prompt, model.vocab_size)
    return await _answer(services, key, bearer, model, tuple(prompt), body, [], idempotency_key)


@router.get(
    "/v1/jobs/{job_id}/stream",
    response_class=StreamingResponse,
    response_model=None,
    responses=stream_of(ChatChunk, TextChunk),
)
async def job_stream(
    job_id: str,
    key: AnsweredKey,
    services: ServicesNow,
    after: Annotated[int, Query(ge=0)] = 0,
    chat: bool = False,
) -> Response:
    """Stream a job's answer from its completion token `after` on, as the chunks of a text or of a chat.

    Each chunk's `azu.after` is the place to continue from if the stream breaks. A job whose client hung up
    goes on, and stands still again when this reader hangs up too. The chunks are those of the first stream.
    """
    record = await owned(services, key, job_id)
    job = record.job
    if after > record.delivered:
        raise InvalidRequest(f"after is {after}; the job has {record.delivered} tokens so far", param="after")
    model = await services.model(job.model_id)
    answer = AnswerFormatter(
        chat=chat, job_id=job_id, model=job.model_id, created_s=job.created_at_ms // 1000,
        decoder=model.tokenizer,
    )  # fmt: skip
    parsers = _parsers(model, job.prompt_token_ids, record.tools, job.choices if chat else 0)
    deltas = follow(services.jobs, job, model.tokenizer, after, parsers)
    options = StreamOptions(include_usage=True, include_receipt=True)
    events = _events(job, deltas, answer, options, after)
    if not record.asked:
        return EventStream(_noting_the_end(services, job_id, events), partial(_sign, services, job))
    if record.outcome is not None:
        return EventStream(events)
    reader = Reader(job_id, job.address, record.asked, secrets.token_hex(8))
    return _ReadStream(_Reading(services, reader), events, partial(_sign, services, job))


async def _noting_the_end(services: Services, job_id: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the events of a job that no connection waits for, and note that all were read."""
    async for event in events:
        yield event
    await services.jobs.note_read(job_id)


async def _answer(
    services: Services, key: ApiKey, bearer: str, model: ServedModel, prompt: tuple[int, ...],
    body: ChatRequest | CompletionRequest, tools: Sequence[Mapping[str, Any]], idempotency_key: str | None,
) -> Response:  # fmt: skip
    limit = services.intake.completion_limit(model.facts, len(prompt))
    sampling = sampling_params(body, model.defaults, model.vocab_size, default_max_tokens=limit)
    choices = body.n or 1
    is_chat = isinstance(body, ChatRequest)
    parsers = _parsers(model, prompt, tools, choices if is_chat else 0)
    asked = request_name(key.key_id, _content(body, idempotency_key))

    async def begin() -> tuple[Job, Reader]:
        if (reader := await services.intake.departures.find(key.address, asked)) is not None:
            return (await owned(services, key, reader.job_id)).job, reader
        if not body.stream:
            services.intake.check_sizes(model.facts, len(prompt), sampling.max_tokens)
            await services.check_wait(model.facts, len(prompt), max_tokens(body, min(limit, _USUAL_TOKENS)))
        job = await services.intake.accept(
            key, bearer, model.facts, prompt, sampling, choices, asked=asked, tools=tools
        )
        return job, Reader(job.job_id, key.address, asked)

    job, reader = await _begun(services, asyncio.create_task(begin()))
    reading = _Reading(services, reader)
    answer = AnswerFormatter(
        chat=is_chat, job_id=job.job_id, model=body.model, created_s=int(time.time()),
        decoder=model.tokenizer,
    )  # fmt: skip
    deltas = _unless_unreadable(services, job, follow(services.jobs, job, model.tokenizer, 0, parsers))
    if not body.stream:
        return await _whole(reading, job, deltas, answer)
    options, sign = body.stream_options or StreamOptions(), partial(_sign, services, job)
    stream = _JobStream(reading, deltas, lambda found: _events(job, found, answer, options), sign)
    stream.headers[JOB_ID_HEADER] = job.job_id
    return stream


def _parsers(
    model: ServedModel, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]], choices: int
) -> "list[AnswerParser]":
    """Return what parses the parts of each choice's text, nothing where answers have one part."""
    found = [model.tokenizer.answer_parser(prompt, tools) for _ in range(choices)]
    return [parser for parser in found if parser is not None]


def _content(body: ChatRequest | CompletionRequest, idempotency_key: str | None) -> bytes:
    """Return what makes a request the same as another: its content, or the name that its sender gave it."""
    found = body.model_dump(mode="json") if idempotency_key is None else idempotency_key
    return json.dumps([type(body).__name__, found], sort_keys=True).encode()


async def _begun(services: Services, beginning: asyncio.Task[tuple[Job, Reader]]) -> tuple[Job, Reader]:
    """Let a job be accepted or refused completely, even if its caller disconnects meanwhile."""
    try:
        return await asyncio.shield(beginning)
    except asyncio.CancelledError:
        _, reader = await beginning
        await services.intake.leave(reader)
        raise


class _Reading:
    """One client that reads a job; at the end it has its whole answer or an error, or it left before."""

    def __init__(self, services: Services, reader: Reader) -> None:
        self.is_over = False
        self._reader = reader
        self._intake = services.intake

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        is_over = self.is_over or isinstance(error, Exception)
        note = self._intake.answered if is_over else self._intake.leave
        await asyncio.shield(note(self._reader))

    async def come_back(self) -> None:
        """Note the client, which knows its job."""
        await self._intake.departures.come_back(self._reader)

    async def to_their_end(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """Yield events, and note that all were read."""
        async for event in events:
            yield event
        self.is_over = True


async def _unless_unreadable(services: Services, job: Job, deltas: Deltas) -> Deltas:
    """Yield an answer's deltas; where azu cannot read it, end the job before its client hears of that."""
    try:
        async for delta in deltas:
            yield delta
    except Exception:
        await services.intake.cancel(job.job_id)
        raise


async def _sign(services: Services, job: Job) -> str:
    """Return the comment that tells where a job stands, for clients that read it."""
    try:
        phase = phase_line(await services.jobs.phase(job))
    except Exception as error:
        as_known_error(error, "a sign of life")  # is logged; the answer goes on
        phase = None
    return _SIGN_OF_LIFE if phase is None else f": phase {_one_line(phase)}\n\n"


async def _sign_of_life() -> str:
    return _SIGN_OF_LIFE


Sign = Callable[[], Awaitable[str]]


class EventStream(StreamingResponse):
    """Server-sent events; a comment fills the time in which there are none, so that no reader gives up.

    A comment that is as the last one comes at every other look.
    """

    def __init__(
        self,
        events: AsyncIterator[str],
        sign: Sign = _sign_of_life,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_NO_CACHE)
        self._sign = sign
        self._sleep = sleep

    async def stream_response(self, send: Send) -> None:
        """Send the events and the comments between them."""
        is_silent = False

        async def sent(message: Message) -> None:
            nonlocal is_silent
            is_silent = False
            if not message.get("more_body", True):
                filling.cancel()
            await send(message)

        async def fill() -> None:
            nonlocal is_silent
            told, looks = "", 0
            while True:
                is_silent = True
                await self._sleep(_LOOK_S)
                looks = looks + 1 if is_silent else 0
                if not looks:
                    continue
                sign = await self._sign()
                if is_silent and (sign != told or looks >= _SILENT_LOOKS):
                    await send({"type": "http.response.body", "body": sign.encode(), "more_body": True})
                    told, looks = sign, 0

        filling = asyncio.create_task(fill())
        try:
            await super().stream_response(sent)
        finally:
            filling.cancel()


class _ReadStream(EventStream):
    """A job's events for a client that comes back to it."""

    def __init__(
        self,
        reading: _Reading,
        events: AsyncIterator[str],
        sign: Sign,
    ) -> None:
        super().__init__(reading.to_their_end(events), sign)
        self._reading = reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._reading:
            await self._reading.come_back()
            await super().__call__(scope, receive, send)


class _JobStream(EventStream):
    """A job's events as they come, for the client whose request began or took it up.

    The status waits for what comes first, for a while: a job that fails before has the status of its error.
    """

    def __init__(
        self,
        reading: _Reading,
        deltas: Deltas,
        events: Callable[[Deltas], AsyncIterator[str]],
        sign: Sign,
    ) -> None:
        self._first = asyncio.ensure_future(anext(deltas))
        super().__init__(reading.to_their_end(events(_resumed(self._first, deltas))), sign)
        self._reading = reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held = asyncio.ensure_future(self._sleep(_HELD_BACK_S))
        try:
            async with self._reading:
                await asyncio.wait({self._first, held}, return_when=asyncio.FIRST_COMPLETED)
                refused = await _refused(self._first) if self._first.done() else None
                if refused is None:
                    if not self._first.done():
                        self.body_iterator = _after(await self._sign(), self.body_iterator)
                    await super().__call__(scope, receive, send)
                else:
                    await refused(scope, receive, send)
                    self._reading.is_over = True
        finally:
            held.cancel()
            self._first.cancel()


async def _after(sign: str, events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    yield sign
    async for event in events:
        yield event


async def _resumed(first: Awaitable[TextDelta | JobOutcome], rest: Deltas) -> Deltas:
    yield await first
    async for delta in rest:
        yield delta


async def _refused(first: Awaitable[TextDelta | JobOutcome]) -> Response | None:
    """Return the response of a job that began with its failure."""
    try:
        delta = await first
    except Exception as error:
        # The job may go on without its reader, and be charged.
        return refusal(as_known_error(error, "an answer"), is_final=True)
    if isinstance(delta, TextDelta) or delta.state is JobState.DONE:
        return None
    return _failed(delta)


async def _whole(reading: _Reading, job: Job, deltas: Deltas, answer: AnswerFormatter) -> Response:
    parts = [[TextDelta(choice=index)] for index in range(job.choices)]
    try:
        async with reading:
            async for delta in deltas:
                reading.is_over = not isinstance(delta, TextDelta)
                if isinstance(delta, TextDelta):
                    parts[delta.choice].append(delta)
                elif delta.state is JobState.FAILED:
                    return _failed(delta)
                else:
                    choices = [TextDelta.of(deltas_of_one) for deltas_of_one in parts]
                    # Log probabilities take long, in which the other callers' answers go on.
                    return _json(await asyncio.to_thread(answer.whole, choices, _usage(delta)))
        raise InternalError(f"{job.job_id} ended without an outcome")
    except Exception as error:
        # The job may go on without its reader, and be charged.
        return refusal(as_known_error(error, "an answer"), is_final=True)


async def _events(
    job: Job, deltas: Deltas, answer: AnswerFormatter, options: StreamOptions, after: int = 0
) -> AsyncIterator[str]:
    for choice in range(0 if after else job.choices):
        if opening := answer.opening(choice):
            yield _event(opening)
    try:
        async for delta in deltas:
            if isinstance(delta, TextDelta):
                for chunk in answer.chunks(delta):
                    yield _event(chunk)
            elif delta.state is not JobState.DONE:
                raise _error_of(delta)
            elif options.include_receipt:
                receipt = ReceiptLines.model_validate(receipt_facts(delta.receipt))
                yield _event(answer.usage_chunk(_usage(delta), receipt))
            elif options.include_usage:
                yield _event(answer.usage_chunk(_usage(delta)))
    except Exception as error:
        yield _event(ErrorBody.model_validate(as_known_error(error, "an answer").to_openai()))
    yield "data: [DONE]\n\n"


def _usage(outcome: JobOutcome) -> Usage:
    return usage_of(outcome.receipt.prompt_tokens, outcome.receipt.completion_tokens, outcome.receipt)


def _failed(outcome: JobOutcome) -> Response:
    """Return the response of a job without an answer; one that harms workers is not repeated by itself."""
    error = _error_of(outcome)
    is_final = outcome.receipt.charged_lamports > 0 or isinstance(error, HarmfulRequest | NumericsError)
    return refusal(error, is_final=is_final)


def _error_of(outcome: JobOutcome) -> AzuError:
    if outcome.state is JobState.CANCELLED:
        return Unavailable("the reader of this answer disconnected before its end", code="job_cancelled")
    found = outcome.error or {}
    # An error of the checkpoint comes with every request for it, so it keeps its class and status.
    code = found.get("code")
    kind = next((kind for kind in error_classes() if code and kind.default_code == code), Unavailable)
    return kind(str(found.get("message")), param=found.get("param"), code=code)


def _json(body: ResponseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _event(body: ResponseModel) -> str:
    return f"data: {_one_line(body)}\n\n"


def _one_line(body: ResponseModel) -> str:
    return body.model_dump_json().translate(_LINE_ENDS)
