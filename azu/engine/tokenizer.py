"""A model's own tokenizer: text and chats to token ids, and the parser of its answers' tool calls.

A chat template is a program by the model's author, so it runs within a time limit.
"""

import ctypes
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, TemplateError, meta
from transformers import AutoTokenizer
from transformers.utils.chat_parsing import ResponseParser

from azu.engine.text import ParsedAnswer, TextDecoder, ToolCall
from azu.errors import BrokenCheckpoint, InvalidRequest
from azu.models.config_json import eos_token_ids

# The extension that transformers adds to Jinja for chat templates.
_EXTENSIONS = ("jinja2.ext.loopcontrols",)
# A template usually takes milliseconds.
_TEMPLATE_S = 5.0
# What a template raises when it is faulty or does not fit the messages.
_REFUSALS = (
    TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip
_CONTENT = "content"
_CALLS = "tool_calls"
_REASONING = ("reasoning_content", "reasoning", "thinking")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class Tokenizer(TextDecoder):
    """The tokenizer in a folder of config and tokenizer files; no code of the model runs."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer; raises BrokenCheckpoint when the folder has none that can be loaded."""
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            super().__init__(self._tokenizer.backend_tokenizer)
        except Exception as error:  # whatever the libraries meet in foreign files
            raise BrokenCheckpoint(f"the tokenizer cannot be loaded: {error}") from error
        known = {*eos_token_ids(folder), self._tokenizer.eos_token_id, self._end_of_turn()}
        self.ends = frozenset(token_id for token_id in known if token_id is not None)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """Return the tokenizer of files, name -> content; raises BrokenCheckpoint as the constructor does."""
        with tempfile.TemporaryDirectory(prefix="azu-tokenizer-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            return cls(Path(folder))

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids with the special tokens that the model expects around a prompt."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def takes_tools(self) -> bool:
        """Say whether the chat template describes tools and the answer can be parsed for calls of them."""
        response: Any = getattr(self._tokenizer, "response_template", None)
        fields = response.get("fields") if isinstance(response, dict) else None
        if not self._tokenizer.chat_template or not isinstance(fields, dict) or "tool_calls" not in fields:
            return False
        try:
            template = self._tokenizer.get_chat_template(tools=[])
            # Variables that the template reads without setting them are its inputs.
            parsed = Environment(autoescape=False, extensions=_EXTENSIONS).parse(template)  # noqa: S701
            return "tools" in meta.find_undeclared_variables(parsed)
        except (TemplateError, ValueError):
            return False

    def answer_parser(
        self, prompt_token_ids: Sequence[int], tools: Sequence[Mapping[str, Any]]
    ) -> "AnswerParser":
        """Return a parser of the answer to a prompt for which `takes_tools` is true."""
        prompt: str = self._tokenizer.decode(list(prompt_token_ids))
        return AnswerParser(self._tokenizer.response_template, prompt, tools)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of a chat in the model's own template, ready for the assistant's answer.

        Raises InvalidRequest when the model has no template, or when the template refuses the messages or
        runs for too long.
        """
        text = self._rendered(list(messages), tools=tools, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _rendered(self, messages: list[Mapping[str, Any]], **given: Any) -> str:
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use completions", param="messages")
        try:
            with time_limit(_TEMPLATE_S):
                text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **given)
        except OutOfTime as error:
            raise InvalidRequest(
                f"the chat template did not finish in {_TEMPLATE_S:.0f} s", param="messages"
            ) from error
        except _REFUSALS as error:
            raise InvalidRequest(
                f"the chat template refuses the messages: {error}", param="messages"
            ) from error
        return text

    def _end_of_turn(self) -> int | None:
        """Return the token that the chat template writes after an answer, None where it writes none."""
        answer = "an answer"
        chat: list[Mapping[str, Any]] = [
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": answer},
        ]
        try:
            behind = self._rendered(chat).rpartition(answer)[2].lstrip()
        except InvalidRequest:
            return None
        found = {
            token.content: token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if behind.startswith(token.content)
        }
        return found[max(found, key=len)] if found else None


class AnswerParser:
    """Parses an answer's text as it arrives, special tokens included.

    Text that begins like a tool call but is not one is content, as the model wrote it.
    """

    def __init__(self, template: Mapping[str, Any], prompt: str, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises BrokenCheckpoint for a template that cannot be used."""
        try:
            self._parser = ResponseParser(dict(template), prefix=prompt, tools=[dict(tool) for tool in tools])
        except Exception as error:  # whatever the library meets in a foreign template
            raise BrokenCheckpoint(f"the response template cannot be used: {error}") from error
        self._broken = False
        # The text since the parser last returned all of it, and the part of this text that was returned.
        self._written = self._returned = ""

    def push(self, text: str) -> ParsedAnswer:
        """Add text and return what is certain now."""
        if self._broken:
            return ParsedAnswer(content=text)
        self._written += text
        return self._read(lambda: self._parser.feed(text))

    def finish(self) -> ParsedAnswer:
        """Return what was held back."""
        return ParsedAnswer() if self._broken else self._read(lambda: self._parser.finalize()[1])

    def _read(self, events: Callable[[], Sequence[Mapping[str, Any]]]) -> ParsedAnswer:
        try:
            parsed, closed = _parsed(events())
        except Exception:  # the model's text does not follow its template
            self._broken = True
            return ParsedAnswer(content=self._written.removeprefix(self._returned))
        self._returned += parsed.content
        if closed or self._returned == self._written:
            self._written = self._returned = ""
        return parsed


def _parsed(events: Sequence[Mapping[str, Any]]) -> tuple[ParsedAnswer, bool]:
    """Return the answer that events describe, and whether a region other than content has ended."""
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
    return ParsedAnswer(content, reasoning, tuple(calls)), closed


def _calls(value: Any) -> list[ToolCall]:
    """Return the calls in a region; raises ValueError for any other value."""
    calls = []
    for one in value if isinstance(value, list) else [value]:
        function = one.get("function", one) if isinstance(one, dict) else {}
        name, arguments = function.get("name"), function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
            raise ValueError("not a function call")
        calls.append(ToolCall(name, json.dumps(arguments)))
    return calls


class OutOfTime(BaseException):
    """Raised inside code whose time is over. That code may catch every Exception: this is none."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in this thread when the block has run for so long.

    The exception arrives between two instructions of Python code: a call into C is not interrupted.
    """
    thread_id = ctypes.c_ulong(threading.get_ident())
    lock, is_over = threading.Lock(), False

    def end() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(OutOfTime))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        # If `end` already holds the lock, OutOfTime is raised here.
        with lock:
            is_over = True
        timer.cancel()
