"""An answer as it comes."""

import json
from collections import defaultdict
from collections.abc import Generator, Iterator
from typing import Any

import httpx

from azu.client.answers import Generation
from azu.client.errors import error_of, raise_for, translated
from azu.errors import Unavailable


class Stream:
    """The pieces of one answer as they come; `result()` after the last one.

    Of several choices the first one's pieces are given, and the result has all.
    Leaving the loop early or calling `close()` cancels the job: what was delivered is paid.
    """

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        self._request = client.stream(
            "POST", path, json=body | {"stream": True, "stream_options": {"include_usage": True}}
        )
        self._model = body["model"]
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._job_id = ""
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
        with translated(), self._request as response:
            if response.is_error:
                response.read()
                raise_for(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                content = line.removeprefix("data: ")
                chunk = json.loads(content)
                if "error" in chunk:
                    raise error_of(None, content.encode())
                if piece := self._take(chunk):
                    yield piece

    def _take(self, chunk: dict[str, Any]) -> str:
        self._job_id = chunk["azu"]["job_id"]
        self._usage = chunk.get("usage") or self._usage
        given = ""
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self._texts[choice["index"]].append(piece)
            if choice["index"] == 0:
                given += piece
                self._finish_reason = choice["finish_reason"] or self._finish_reason
        return given
