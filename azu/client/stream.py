"""A streamed answer: its text as it comes, and what it was and cost at the end."""

import json
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from types import AsyncGeneratorType
from typing import Any, Generic, Self, cast

import httpx

from azu.api.base import read
from azu.api.jobs import Phase
from azu.api.openai import JOB_ID_HEADER, ChatChunk, ChatChunkChoice, TextChoice, TextChunk
from azu.api.receipts import ReceiptLines
from azu.client.generation import CHAT, Choice, Generation, Kind
from azu.client.http import error_of, raise_for, translated
from azu.client.wire import Wire
from azu.errors import AzuError, InternalError, Unavailable

Chunk = ChatChunk | TextChunk
# The comment in which the network says where a job stands.
_PHASE = ": phase "
# Seconds before each attempt to come back after the connection broke.
_RETURNS_S = (0.2, 0.5, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0)
_CANCEL_S = 10.0


class AsyncStream(Generic[Choice]):
    """The text of one answer as it comes, and its `result()` at the end.

    The iterator yields the text of the first choice, `chunks()` all that comes; the result has all choices.
    When the connection breaks, the stream connects again and continues behind the last chunk. A caller that
    leaves the `async with` block early, calls `close()` or is cancelled cancels the job and pays for the
    tokens that were delivered.

    `phase` says where the job stands while no text comes; each new one is given to `on_phase`.

    Iterating raises the AzuError that ended the job, and Unavailable for a stream that ends before its answer
    is complete.
    """

    def __init__(self, wire: Wire, kind: Kind[Choice], body: dict[str, Any]) -> None:
        self._wire = wire
        self._kind = kind
        self._body = body | {"stream": True, "stream_options": {"include_receipt": True}}
        self._model = body["model"]
        self._choices: defaultdict[int, list[Any]] = defaultdict(list)
        self._job_id = ""
        self._after = 0
        self._received = 0
        self._is_done = False
        self._is_closed = False
        self._receipt: ReceiptLines | None = None
        self._chunks = cast(AsyncGeneratorType[Chunk, None], self._read())
        self.phase: Phase | None = None
        self.on_phase: Callable[[Phase], None] | None = None
        self.at_end: Callable[[], Awaitable[None]] | None = None

    @property
    def job_id(self) -> str:
        """The id of the answer's job, empty before the network has answered."""
        return self._job_id

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        try:
            async for chunk in self._chunks:
                if text := "".join(_text(choice) for choice in chunk.choices if choice.index == 0):
                    return text
        except RuntimeError as error:
            if self._is_closed:  # by another thread, just now
                raise Unavailable("the stream was closed", code="job_cancelled") from error
            raise
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def chunks(self) -> AsyncIterator[Chunk]:
        """Yield the rest as it comes: texts of all choices, reasoning, tool calls, log probabilities."""
        return self._chunks

    async def close(self) -> None:
        """End the stream and its job; a loop in another task gets the error of a cancelled job."""
        self._is_closed = True
        if self._chunks.ag_running:
            await self._end_job()
            return
        try:
            await self._chunks.aclose()
        except RuntimeError:
            # Another thread has begun to wait for the next chunk.
            await self._end_job()

    async def result(self) -> Generation[Choice]:
        """Read the rest of the answer and return it whole."""
        async for _ in self._chunks:
            pass
        if self._receipt is None:
            raise Unavailable("the stream ended without the receipt of its answer")
        return Generation(
            model=self._model,
            job_id=self._job_id,
            choices=tuple(self._kind.whole(parts) for _, parts in sorted(self._choices.items())),
            receipt=self._receipt,
            received_tokens=self._received,
        )

    async def _read(self) -> AsyncGenerator[Chunk, None]:
        try:
            with translated():
                async with aclosing(self._read_all()) as chunks:
                    async for chunk in chunks:
                        yield chunk
        except AzuError:
            raise
        except BaseException:
            # The caller leaves, is interrupted or cancelled, or what it is told with fails.
            await self._end_job()
            raise
        finally:
            if self.at_end is not None:
                await self.at_end()

    async def _end_job(self) -> None:
        """Have the network end the job now; without that it would wait for its client to come back."""
        if self._job_id and not self._is_done and not self._wire.http.is_closed:
            with suppress(httpx.HTTPError), self._wire.unbroken():
                await self._wire.http.post(f"/v1/jobs/{self._job_id}/cancel", timeout=_CANCEL_S)

    async def _read_all(self) -> AsyncGenerator[Chunk, None]:
        post = self._wire.http.stream("POST", self._kind.path, json=self._body)
        asked: AbstractAsyncContextManager[httpx.Response] = post
        waits = iter(_RETURNS_S)
        while True:
            lost: Exception = Unavailable("the stream ended before its answer was complete")
            try:
                async with asked as response:
                    # Until the network has started again it refuses who comes back.
                    if not (response.status_code == Unavailable.status and self._job_id):
                        await _raise_for(response)
                        self._job_id = response.headers.get(JOB_ID_HEADER, self._job_id)
                        if self._is_closed:  # before the job had an id here
                            await self._end_job()
                        rest = ""
                        # To its end, so that the next request can use the connection.
                        async for piece in response.aiter_text():
                            # httpx splits also at U+2028 and others, which JSON may hold.
                            *lines, rest = (rest + piece).split("\n")
                            for line in lines:
                                if (chunk := self._taken(line)) is not None:
                                    yield chunk
            except httpx.TransportError as error:
                lost = error
            if self._is_done:
                return
            wait_s = next(waits, None) if self._job_id else None
            if wait_s is None or isinstance(lost, httpx.TimeoutException):
                raise lost
            await self._wire.sleep(wait_s)
            asked = self._rest()

    def _rest(self) -> AbstractAsyncContextManager[httpx.Response]:
        """Ask for what follows the last chunk."""
        if not self._after:
            self._choices.clear()  # they come again
        query: dict[str, Any] = {"chat": self._kind is CHAT, "after": self._after}
        return self._wire.http.stream("GET", f"/v1/jobs/{self._job_id}/stream", params=query)

    def _taken(self, line: str) -> Chunk | None:
        """Keep what a line of the stream adds and return its chunk; raises the error that it carries."""
        if line.startswith(_PHASE):
            self._take_phase(line.removeprefix(_PHASE))
        if self._is_done or not line.startswith("data: "):
            return None
        content = line.removeprefix("data: ")
        if content == "[DONE]":
            self._is_done = True
            return None
        try:
            event = json.loads(content)
        except ValueError as error:
            raise InternalError("an event of the stream is no JSON") from error
        if isinstance(event, dict) and "error" in event:
            raise error_of(None, content.encode())
        chunk = read(ChatChunk, event) if self._kind is CHAT else read(TextChunk, event)
        self._job_id = chunk.azu.job_id
        self._receipt = chunk.azu.receipt or self._receipt
        # A part of an answer that is no text has no place of its own.
        self._after = self._after if chunk.azu.after is None else chunk.azu.after
        self._received = max(self._received, self._after)
        for choice in chunk.choices:
            self._choices[choice.index].append(choice)
        return chunk

    def _take_phase(self, content: str) -> None:
        try:
            self.phase = read(Phase, json.loads(content))
        except (ValueError, InternalError):
            return  # a newer network may have other phases: the answer is read all the same
        if self.on_phase is not None:
            self.on_phase(self.phase)


async def _raise_for(response: httpx.Response) -> None:
    if response.is_error:
        await response.aread()
        raise_for(response)


def _text(choice: ChatChunkChoice | TextChoice) -> str:
    return choice.text if isinstance(choice, TextChoice) else choice.delta.content or ""
