"""A model's raw answer as content, reasoning and tool calls, by its tokenizer's own response template."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from azu.errors import BrokenCheckpoint
from azu.protocol.answer import Parsed, ToolCall

_CONTENT = "content"
_CALLS = "tool_calls"
_REASONING = ("reasoning_content", "reasoning", "thinking")


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class AnswerParser:
    """Takes an answer's text as it comes, special tokens included.

    What begins like a tool call and is none is content, as the model wrote it.
    """

    def __init__(self, template: Mapping[str, Any], prompt: str, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises BrokenCheckpoint for a template that is none."""
        try:
            self._parser = ResponseParser(dict(template), prefix=prompt, tools=[dict(tool) for tool in tools])
        except Exception as error:  # whatever the library meets in a foreign template
            raise BrokenCheckpoint(f"the response template cannot be used: {error}") from error
        self._broken = False
        # What the model wrote since all of it was read, and what of it is shown.
        self._written = self._shown = ""

    def push(self, text: str) -> Parsed:
        """Return what is certain after more text."""
        if self._broken:
            return Parsed(content=text)
        self._written += text
        return self._read(lambda: self._parser.feed(text))

    def finish(self) -> Parsed:
        """Return what was held back."""
        return Parsed() if self._broken else self._read(lambda: self._parser.finalize()[1])

    def _read(self, events: Callable[[], Sequence[Mapping[str, Any]]]) -> Parsed:
        try:
            parsed, closed = _parsed(events())
        except Exception:  # the model's text is not what its template promises
            self._broken = True
            return Parsed(content=self._written.removeprefix(self._shown))
        self._shown += parsed.content
        if closed or self._shown == self._written:
            self._written = self._shown = ""
        return parsed


def _parsed(events: Sequence[Mapping[str, Any]]) -> tuple[Parsed, bool]:
    """Return what events say, and whether a region that is no content has ended."""
    content, reasoning, closed = "", "", False
    calls: list[ToolCall] = []
    for event in events:
        kind, name = event["type"], event["field"]
        if kind == "region_chunk" and name == _CONTENT:
            content += event["text"]
        elif kind == "region_chunk" and name in _REASONING:
            reasoning += event["text"]
        elif kind == "region_close" and name != _CONTENT:
            closed = True
            calls += _calls(event["value"]) if name == _CALLS else ()
    return Parsed(content, reasoning, tuple(calls)), closed


def _calls(value: Any) -> list[ToolCall]:
    """Return the calls of a region; raises ValueError for what is no call."""
    calls = []
    for one in value if isinstance(value, list) else [value]:
        function = one.get("function", one) if isinstance(one, dict) else {}
        name, arguments = function.get("name"), function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
            raise ValueError("not a call of a function")
        calls.append(ToolCall(name, json.dumps(arguments)))
    return calls
