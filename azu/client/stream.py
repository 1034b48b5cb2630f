"""An answer as it comes."""

import json
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import httpx

from azu.client.http import error_of, raise_for, translated
from azu.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished text, what it took and what it cost; `texts` holds that of every choice."""

    text: str
    model: str
    job_id: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    charged_lamports: int
    texts: tuple[str, ...] = ()


# How long to wait before coming back, again and again, while the network is away.
_RETURNS_S = (0.2, 0.5, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0)


class Stream:
    """The pieces of one answer as they come; `result()` after the last one.

    Of several choices the first one's pieces are given, and the result has all. When the connection breaks,
    the stream comes back and goes on behind the last piece it got.
    Leaving the loop early or calling `close()` cancels the job: what was delivered is paid.
    """

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        self._client = client
        self._path = path
        self._body = body | {"stream": True, "stream_options": {"include_usage": True}}
        self._model = body["model"]
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._job_id = ""
        self._after = 0
        self._is_done = False
        self._finish_reason = ""
        self._usage: dict[str, int] | None = None
        self._pieces = self._read()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """End the stream; the network cancels the job."""
        self._pieces.close()

    def result(self) -> Generation:
        """Return the whole answer, reading what is left of it."""
        for _ in self._pieces:
            pass
        if self._usage is None:
            raise Unavailable("the stream ended before its usage was said")
        return Generation(
            text="".join(self._texts[0]),
            model=self._model,
            job_id=self._job_id,
            finish_reason=self._finish_reason,
            prompt_tokens=self._usage["prompt_tokens"],
            completion_tokens=self._usage["completion_tokens"],
            charged_lamports=self._usage["cost_lamports"],
            texts=tuple("".join(pieces) for _, pieces in sorted(self._texts.items())),
        )

    def _read(self) -> Generator[str, None, None]:
        with translated():
            lost = yield from self._read_one(self._client.stream("POST", self._path, json=self._body))
            query: dict[str, Any] = {"chat": "messages" in self._body}
            for wait_s in _RETURNS_S if self._job_id else ():
                if self._is_done:
                    return
                time.sleep(wait_s)
                path = f"/v1/jobs/{self._job_id}/stream"
                again = self._client.stream("GET", path, params=query | {"after": self._after})
                lost = yield from self._read_one(again)
            if not self._is_done:
                raise lost or Unavailable("the stream ended before its end")

    def _read_one(
        self, answering: AbstractContextManager[httpx.Response]
    ) -> Generator[str, None, Exception | None]:
        """Read until the end or until the connection breaks; return what broke it."""
        try:
            with answering as response:
                if response.status_code == Unavailable.status and self._job_id:
                    return None  # it is coming up again
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
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            content = line.removeprefix("data: ")
            if content == "[DONE]":
                self._is_done = True
                return
            chunk = json.loads(content)
            if "error" in chunk:
                raise error_of(None, content.encode())
            if piece := self._take(chunk):
                yield piece

    def _take(self, chunk: dict[str, Any]) -> str:
        self._job_id = chunk["azu"]["job_id"]
        self._after = chunk["azu"].get("after", self._after)
        self._usage = chunk.get("usage") or self._usage
        given = ""
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self._texts[choice["index"]].append(piece)
            if choice["index"] == 0:
                given += piece
                self._finish_reason = choice["finish_reason"] or self._finish_reason
        return given
