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
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, TemplateError, meta
from transformers import AutoTokenizer
from transformers.utils.chat_parsing import ResponseParser

from azu.engine.plain_text import PlainText, is_marked
from azu.engine.text import MARKUP, ParsedAnswer, TextDecoder, ToolCall, joined
from azu.errors import BrokenCheckpoint, InvalidRequest, plain_reason
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
_ANCHORS = ("open", "close", "start_anchor")
_PATTERN = "_pattern"
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
            reason = plain_reason(
                error, "its files are missing, damaged or of a kind without a fast tokenizer"
            )
            raise BrokenCheckpoint(f"the tokenizer cannot be loaded: {reason}") from error
        turns, behind_answer = self._tokens_of_turns()
        known = {*eos_token_ids(folder), self._tokenizer.eos_token_id, behind_answer}
        self.ends = frozenset(token_id for token_id in known if token_id is not None)
        self._plain = PlainText(self._backend, self.ends | turns)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """Return the tokenizer of files, name -> content; raises BrokenCheckpoint as the constructor does."""
        with tempfile.TemporaryDirectory(prefix="azu-tokenizer-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            return cls(Path(folder))

    def encode(self, text: str, *, takes_special: bool = False) -> list[int]:
        """Return a text's token ids with the special tokens that the model expects around a prompt.

        A special token that is spelled in the text is text too, unless the prompt `takes_special` ones.
        """
        return self._ids(text if takes_special else self._plain.marked(text), is_prompt=True)

    def takes_tools(self) -> bool:
        """Say whether the chat template describes tools and the answer can be parsed for calls of them."""
        if not self._tokenizer.chat_template or _CALLS not in self._fields:
            return False
        try:
            template = self._tokenizer.get_chat_template(tools=[])
            # Variables that the template reads without setting them are its inputs.
            parsed = Environment(autoescape=False, extensions=_EXTENSIONS).parse(template)  # noqa: S701
            return "tools" in meta.find_undeclared_variables(parsed)
        except (TemplateError, ValueError):
            return False

    @cached_property
    def markup(self) -> Mapping[int, str]:
        """The tokens that may stand between the parts of an answer, with their names."""
        text = json.dumps(self._response, ensure_ascii=False)
        added = self._backend.get_added_tokens_decoder()
        names = {token_id: token.content for token_id, token in added.items() if token.content.strip()}
        # Which tokens a pattern means is unknown.
        return {token_id: name for token_id, name in names.items() if name in text or _PATTERN in text}

    def answer_parser(
        self, prompt_token_ids: Sequence[int], tools: Sequence[Mapping[str, Any]]
    ) -> "AnswerParser | None":
        """Return a parser of the answer to a prompt; None for a model whose answers have one part."""
        fields = {name: field for name, field in self._fields.items() if tools or name != _CALLS}
        if not fields.keys() & {_CALLS, *_REASONING}:
            return None
        prompt, run = "", []
        for token_id in prompt_token_ids:
            if (name := self.markup.get(token_id)) is None:
                run.append(token_id)
                continue
            prompt += f"{self._backend.decode(run, skip_special_tokens=False)}{MARKUP}{name}"
            run = []
        prompt += self._backend.decode(run, skip_special_tokens=False)
        template = {**self._response, "fields": fields}
        are_known = _PATTERN not in json.dumps(template)
        return AnswerParser(template, prompt, tools, frozenset(self.markup.values() if are_known else ()))

    @property
    def _response(self) -> Mapping[str, Any]:
        template: Any = getattr(self._tokenizer, "response_template", None)
        return template if isinstance(template, dict) else {}

    @property
    def _fields(self) -> Mapping[str, Any]:
        fields = self._response.get("fields")
        return fields if isinstance(fields, dict) else {}

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the token ids of a chat in the model's own template, ready for the assistant's answer.

        Special tokens come from the template alone: one that a message spells is text.
        Raises InvalidRequest when the model has no template, or when the template refuses the messages or
        runs for too long.
        """
        marked = self._plain.marked(messages)
        text = self._rendered(marked, tools=self._plain.marked(tools), add_generation_prompt=True)
        return self._ids(text, is_prompt=False)

    def _ids(self, text: str, *, is_prompt: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=is_prompt)["input_ids"]
        return self._plain.ids(text, is_prompt=is_prompt) if is_marked(text) else ids

    def _rendered(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use completions", param="messages")
        try:
            with time_limit(_TEMPLATE_S):
                text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **given)
        except OutOfTime as error:
            raise InvalidRequest(
                f"the chat template did not finish in {_TEMPLATE_S:.0f} s", param="messages"
            ) from error
        except _REFUSALS as error:
            raise InvalidRequest(
                f"the chat template refuses the messages: {plain_reason(error, 'it does not fit them')}",
                param="messages",
            ) from error
        return text

    def _tokens_of_turns(self) -> tuple[frozenset[int], int | None]:
        """Return the added tokens that the chat template writes around turns, and that behind an answer."""
        turns = [("user", "a question"), ("assistant", "an answer"), ("user", "a question more")]
        chat = [{"role": role, _CONTENT: content} for role, content in turns]
        try:
            before, _, behind = self._rendered(chat).partition("an answer")
            alone = self._rendered(chat[:2]).rpartition("an answer")[2].lstrip()
        except InvalidRequest:
            return frozenset(), None
        added = {
            token.content: token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.content.strip()
        }
        ends = [name for name in added if alone.startswith(name)]
        around = frozenset(token_id for name, token_id in added.items() if name in before + behind)
        return around, added[max(ends, key=len)] if ends else None


class AnswerParser:
    """Parses an answer's text as it arrives.

    Of the template's anchors, those in `names` are tokens, which have MARKUP before them. Text that begins
    like a tool call but is not one is content, as the model wrote it.
    """

    def __init__(
        self,
        template: Mapping[str, Any],
        prompt: str,
        tools: Sequence[Mapping[str, Any]],
        names: frozenset[str] = frozenset(),
    ) -> None:
        """Raises BrokenCheckpoint for a template that cannot be used."""
        try:
            marked = _with_markup(dict(template), names)
            self._has_markup = bool(names)
            self._parser = ResponseParser(
                marked, prefix=self._readable(prompt), tools=[dict(tool) for tool in tools]
            )
        except Exception as error:  # whatever the library meets in a foreign template
            reason = plain_reason(error, "it is malformed")
            raise BrokenCheckpoint(f"the response template cannot be used: {reason}") from error
        self._broken = False
        # The text since the parser last returned all of it, and the part of this text that was returned.
        self._written = self._returned = ""

    def push(self, text: str) -> ParsedAnswer:
        """Add text and return what is certain now, which does not depend on how the text is divided."""
        return joined(self._push_one(character) for character in self._readable(text))

    def _readable(self, text: str) -> str:
        return text if self._has_markup else text.replace(MARKUP, "")

    def _push_one(self, character: str) -> ParsedAnswer:
        # What the library found before an error would be lost with the rest of a longer text.
        if self._broken:
            return ParsedAnswer(content=character.replace(MARKUP, ""))
        self._written += character
        return self._read(lambda: self._parser.feed(character))

    def finish(self) -> ParsedAnswer:
        """Return what was held back."""
        return ParsedAnswer() if self._broken else self._read(lambda: self._parser.finalize()[1])

    def _read(self, events: Callable[[], Sequence[Mapping[str, Any]]]) -> ParsedAnswer:
        try:
            parsed, closed = _parsed(events())
        except Exception:  # the model's text does not follow its template
            self._broken = True
            rest = self._written.removeprefix(self._returned)
            return ParsedAnswer(content=rest.replace(MARKUP, ""))
        self._returned += parsed.content
        if closed or self._returned == self._written:
            self._written = self._returned = ""
        return ParsedAnswer(
            parsed.content.replace(MARKUP, ""), parsed.reasoning.replace(MARKUP, ""), parsed.tool_calls
        )


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
        name, arguments = function.get("name"), function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
            raise ValueError("not a function call")
        calls.append(ToolCall(name, json.dumps(arguments).replace(json.dumps(MARKUP)[1:-1], "")))
    return calls


def _with_markup(value: Any, names: frozenset[str], key: str = "") -> Any:
    """Return a response template with MARKUP before the tokens in its anchors."""
    if isinstance(value, dict):
        return {key: _with_markup(one, names, key) for key, one in value.items()}
    if key not in _ANCHORS:
        return value
    if isinstance(value, list):
        return [_with_markup(one, names, key) for one in value]
    for name in names if isinstance(value, str) else ():
        value = value.replace(name, MARKUP + name)
    return value


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
