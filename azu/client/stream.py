"""A streamed answer: its text as it comes, and what it was and cost at the end."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import httpx

from azu.api.base import read
from azu.api.jobs import Phase
from azu.api.openai import ChatChunk, TextChoice, TextChunk, Usage
from azu.client.http import error_of, raise_for, translated
from azu.errors import InternalError, Unavailable


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer and its cost. `text` is the first choice's; `texts` has every choice's.

    `completion_tokens` is what the network counted and charged, `received_tokens` what came.
    """

    text: str
    model: str
    job_id: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    charged_lamports: int
    texts: tuple[str, ...] = ()
    received_tokens: int = 0


# The comment in which the network says where a job stands.
_PHASE = ": phase "
# Seconds before each attempt to come back after the connection broke.
_RETURNS_S = (0.2, 0.5, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0)


class Stream:
    """The text of one answer as it comes, and its `result()` at the end.

    The iterator yields the text of the first choice; the result has all choices. When the connection breaks,
    the stream connects again and continues behind the last chunk. A caller that leaves the loop early or
    calls `close()` cancels the job and pays for the tokens that were delivered.

    `phase` says where the job stands while no text comes; each new one is given to `on_phase`.

    Iterating raises the AzuError that ended the job, and Unavailable for a stream that ends before its answer
    is complete.
    """

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        self._client = client
        self._path = path
        self._body = body | {"stream": True, "stream_options": {"include_usage": True}}
        self._is_chat = "messages" in body
        self._model = body["model"]
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._job_id = ""
        self._after = 0
        self._received = 0
        self._is_done = False
        self._finish_reason = ""
        self._usage: Usage | None = None
        self._text = self._read()
        self.phase: Phase | None = None
        self.on_phase: Callable[[Phase], None] | None = None

    def __iter__(self) -> Iterator[str]:
        return self._text

    @property
    def job_id(self) -> str:
        """The id of the answer's job, empty before anything of the answer came."""
        return self._job_id

    def close(self) -> None:
        """End the stream and its job."""
        self._text.close()

    def result(self) -> Generation:
        """Read the rest of the answer and return it whole."""
        for _ in self._text:
            pass
        if self._usage is None or self._usage.cost_lamports is None:
            raise Unavailable("the stream ended without the usage and its cost")
        return Generation(
            text="".join(self._texts[0]),
            model=self._model,
            job_id=self._job_id,
            finish_reason=self._finish_reason,
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=self._usage.completion_tokens,
            charged_lamports=self._usage.cost_lamports,
            texts=tuple("".join(texts) for _, texts in sorted(self._texts.items())),
            received_tokens=self._received,
        )

    def _read(self) -> Generator[str, None, None]:
        try:
            yield from self._read_all()
        except (GeneratorExit, KeyboardInterrupt):
            self._end_job()
            raise

    def _end_job(self) -> None:
        """Have the network end the job now; without that it would wait for its client to come back."""
        if self._job_id and not self._is_done:
            with suppress(httpx.HTTPError):
                self._client.post(f"/v1/jobs/{self._job_id}/cancel")

    def _read_all(self) -> Generator[str, None, None]:
        with translated():
            lost = yield from self._read_one(self._client.stream("POST", self._path, json=self._body))
            query: dict[str, Any] = {"chat": self._is_chat}
            for wait_s in _RETURNS_S if self._job_id else ():
                if self._is_done:
                    return
                time.sleep(wait_s)
                path = f"/v1/jobs/{self._job_id}/stream"
                again = self._client.stream("GET", path, params=query | {"after": self._after})
                lost = yield from self._read_one(again)
            if not self._is_done:
                raise lost or Unavailable("the stream ended before its answer was complete")

    def _read_one(
        self, answering: AbstractContextManager[httpx.Response]
    ) -> Generator[str, None, Exception | None]:
        """Read until the end or until the connection breaks; return the error that broke it."""
        try:
            with answering as response:
                if response.status_code == Unavailable.status and self._job_id:
                    return None  # the network is starting again
                if response.is_error:
                    response.read()
                    raise_for(response)
                yield from self._read_lines(response)
        except httpx.TimeoutException:
            raise
        except httpx.TransportError as error:
            return error
        return None

    def _read_lines(self, response: httpx.Response) -> Generator[str, None, None]:
        for line in _lines(response.iter_text()):
            if line.startswith(_PHASE):
                self._take_phase(line.removeprefix(_PHASE))
            if not line.startswith("data: "):
                continue
            content = line.removeprefix("data: ")
            if content == "[DONE]":
                self._is_done = True
                return
            if text := self._take(self._parsed(content)):
                yield text

    def _take_phase(self, content: str) -> None:
        try:
            self.phase = read(Phase, json.loads(content))
        except (ValueError, InternalError):
            return  # a newer network may have other phases: the answer is read all the same
        if self.on_phase is not None:
            self.on_phase(self.phase)

    def _parsed(self, content: str) -> ChatChunk | TextChunk:
        """Return an event's chunk; raises the error that the event carries."""
        try:
            event = json.loads(content)
        except ValueError as error:
            raise InternalError("an event of the stream is no JSON") from error
        if isinstance(event, dict) and "error" in event:
            raise error_of(None, content.encode())
        return read(ChatChunk, event) if self._is_chat else read(TextChunk, event)

    def _take(self, chunk: ChatChunk | TextChunk) -> str:
        """Keep what a chunk adds to each choice and return the first choice's new text."""
        self._job_id = chunk.azu.job_id
        self._after = self._after if chunk.azu.after is None else chunk.azu.after
        # A part of an answer that is no text has no place of its own.
        self._received = max(self._received, self._after)
        self._usage = chunk.usage or self._usage
        first = ""
        for choice in chunk.choices:
            text = choice.text if isinstance(choice, TextChoice) else choice.delta.content or ""
            self._texts[choice.index].append(text)
            if choice.index == 0:
                first += text
                self._finish_reason = choice.finish_reason or self._finish_reason
        return first


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the whole lines of a stream; httpx splits also at U+2028 and others, which JSON may hold."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
