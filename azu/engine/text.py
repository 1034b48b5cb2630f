"""Token ids to text, as they come. No transformers here: it is quick to load wherever text is looked at."""

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from azu.protocol.job import FinishReason
from azu.protocol.sampling import SamplingParams


class Decoder(Protocol):
    """Turns token ids into text as they come."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that is certain after these tokens."""

    def finish(self) -> str:
        """Return what was held back."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new of one choice of an answer.

    `text` may be shown. `token_offsets` says where in the choice's text the tokens begin that are settled
    with it: the choice's next tokens, in order, without those that wrote at a stop string. `token_ids`,
    `logprobs` and `top_logprobs` (best first) are parallel to it if the job asked for log probabilities,
    else empty. `reasoning` and `tool_calls` were parsed out of the text; `num_calls` counts the choice's
    calls up to here. With a `finish_reason` this is the last delta of the choice. `after` counts the job's
    completion tokens up to here: a reader that comes back continues behind them.
    """

    text: str = ""
    token_offsets: tuple[int, ...] = ()
    choice: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    num_calls: int = 0
    finish_reason: FinishReason | None = None
    after: int = 0

    def joined(self, later: "TextDelta") -> "TextDelta":
        """Return this delta and a later one of the same choice as one."""
        return replace(
            later,
            text=self.text + later.text,
            token_offsets=self.token_offsets + later.token_offsets,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            top_logprobs=self.top_logprobs + later.top_logprobs,
            reasoning=self.reasoning + later.reasoning,
            tool_calls=self.tool_calls + later.tool_calls,
        )


class CompletionText:
    """The text of one completion, up to the first stop string.

    A stop string that is complete before the completion has `min_tokens` tokens is ordinary text. What may
    become a stop string is held back until the tokens after it decide.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_decoded = 0
        self._num_shown = 0
        self._held = ""
        self._unsettled: deque[tuple[int, int]] = deque()  # where each token's text begins and ends
        self.stopped = False

    def ends_with(self, token_id: int) -> bool:
        """Take the next token and say whether a stop string is complete now."""
        self.push(token_id)
        return self.stopped

    def push(self, token_id: int) -> TextDelta:
        """Take the next token and return what may be shown now."""
        if self.stopped:
            return TextDelta()
        self._num_tokens += 1
        begin = self._num_decoded
        self._take(self._decoder.push([token_id]))
        self._unsettled.append((begin, self._num_decoded))
        if self._num_tokens >= self._min_tokens and (end := self._first_stop()) is not None:
            return self._end_at(end)
        return self._show(len(self._held) - self._num_undecided())

    def finish(self) -> TextDelta:
        """Return the rest of a completion that has ended."""
        if self.stopped:
            return TextDelta()
        self._take(self._decoder.finish())
        if self._num_tokens >= self._min_tokens and (end := self._first_stop()) is not None:
            return self._end_at(end)
        rest = tuple(begin for begin, _ in self._unsettled)
        return TextDelta(self._held, rest)

    def _take(self, text: str) -> None:
        self._held += text
        self._num_decoded += len(text)

    def _end_at(self, end: int) -> TextDelta:
        self.stopped = True
        return self._show(end)

    def _show(self, num_characters: int) -> TextDelta:
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        self._num_shown += num_characters
        settled = []
        while self._unsettled and self._is_shown(*self._unsettled[0]):
            settled.append(self._unsettled.popleft()[0])
        return TextDelta(text, tuple(settled))

    def _is_shown(self, begin: int, end: int) -> bool:
        # A token without text, such as a part of a character, waits for the text after it.
        return begin < self._num_shown and end <= self._num_shown

    def _first_stop(self) -> int | None:
        found = (self._held.find(stop) for stop in self._stop)
        return min((at for at in found if at >= 0), default=None)

    def _num_undecided(self) -> int:
        """Return how many characters at the end are the beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._stop), default=0))
        ends = (length for length in range(longest, 0, -1) if self._may_stop(self._held[-length:]))
        return next(ends, 0)

    def _may_stop(self, end: str) -> bool:
        return any(len(end) < len(stop) and stop.startswith(end) for stop in self._stop)


# How much of a prompt a stream decodes with: enough for any token that joins with the ones before it.
_CONTEXT_TOKENS = 8
_UNKNOWN = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TextDecoder:
    """The half of a tokenizer that makes text; `ends` are the tokens that end an answer."""

    def __init__(self, backend: Backend, ends: frozenset[int] = frozenset()) -> None:
        self._backend = backend
        self._ends = ends

    @classmethod
    def from_json(cls, content: str) -> "TextDecoder":
        """Return the decoder that `to_json` wrote."""
        return TextDecoder(Backend.from_str(content))

    def to_json(self) -> str:
        """Return all of the tokenizer that is needed to decode, as text."""
        content: str = self._backend.to_str()
        return content

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """Return one token's text as it stands inside a text, special or not."""
        once: str = self._backend.decode([token_id], skip_special_tokens=False)
        # Many decoders strip the space before a first word.
        twice: str = self._backend.decode([token_id, token_id], skip_special_tokens=False)
        return twice.removeprefix(once) if twice.startswith(once) else once

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return one token's bytes in UTF-8, also of a part of a character; None if they are not known."""
        text = self.token_text(token_id)
        if _UNKNOWN not in text:
            return text.encode()
        name = self._backend.id_to_token(token_id) or ""
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(match[1])
        if name and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return None

    def stream(self, prompt_token_ids: Sequence[int]) -> "TextStream":
        """Return a stream of the text that follows a prompt."""
        return TextStream(self._backend, prompt_token_ids[-_CONTEXT_TOKENS:])

    def completion(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, *, raw: bool = False
    ) -> CompletionText:
        """Return the text that follows a prompt, up to the stop strings of its sampling.

        `raw` text has the special tokens in it, all but those that end it.
        """
        hidden = self._ends if raw else None
        stream = TextStream(self._backend, prompt_token_ids[-_CONTEXT_TOKENS:], hidden)
        return CompletionText(stream, sampling.stop, sampling.min_tokens)


class TextStream:
    """Turns token ids into text as they come; a piece never ends inside a character.

    Special tokens are left out, or with `hidden` those alone.
    """

    def __init__(
        self, backend: Backend, context: Sequence[int], hidden: frozenset[int] | None = None
    ) -> None:
        self._backend = backend
        self._context = list(context)
        self._skips = hidden is None
        self._hidden = hidden or frozenset()
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=self._skips)
        self._token_ids: list[int] = []
        self._given = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that is certain after these tokens, "" if none is yet."""
        text = ""
        for token_id in token_ids:
            if token_id in self._hidden:
                continue
            self._token_ids.append(token_id)
            text += self._stream.step(self._backend, token_id) or ""
        self._given += len(text)
        return text

    def finish(self) -> str:
        """Return what was held back: the start of a character that never came is shown as U+FFFD."""
        before = self._backend.decode(self._context, skip_special_tokens=self._skips)
        everything = self._context + self._token_ids
        text: str = self._backend.decode(everything, skip_special_tokens=self._skips)
        return text[len(before) + self._given :]


def _byte_alphabet() -> dict[str, int]:
    """Return the characters that byte-level tokenizers write bytes with (GPT-2's, used by all of them)."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What is new of an answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
