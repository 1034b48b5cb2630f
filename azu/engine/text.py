"""Token ids to text as they arrive, up to a completion's stop string, and the parts of a parsed answer.

No transformers here: the ingress and the pipeline import this file, so it must load fast.
"""

import codecs
import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from types import MappingProxyType
from typing import TypeVar

from tokenizers import Tokenizer as Backend

from azu.protocol.job import FinishReason
from azu.protocol.sampling import SamplingParams

_Item = TypeVar("_Item")

# A stream decodes after so many tokens of the prompt: a token may join with the ones before it.
_CONTEXT_TOKENS = 8
_UNKNOWN = "\ufffd"
# No character needs so many tokens: such a run has no text, or is no text.
_MOST_UNSETTLED = 16
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
# Stands before a token's name in a text with markup: letters that only spell the name are ordinary text.
# Unicode keeps this code point for use inside programs.
MARKUP = "\ufdd2"


class TextDecoder:
    """The half of a tokenizer that makes text; `ends` are the tokens that end an answer."""

    def __init__(self, backend: Backend, ends: frozenset[int] = frozenset()) -> None:
        self._backend = backend
        self.ends = ends
        added = backend.get_added_tokens_decoder()
        self._specials = {token.content: token_id for token_id, token in added.items() if token.special}
        self._byte_of = _byte_tokens(backend)

    @classmethod
    def from_json(cls, content: str) -> "TextDecoder":
        """Return the decoder of a text that `to_json` returned."""
        saved = json.loads(content)
        return TextDecoder(Backend.from_str(saved["tokenizer"]), frozenset(saved["ends"]))

    def to_json(self) -> str:
        """Return all that decoding needs of the tokenizer, as text."""
        return json.dumps({"ends": sorted(self.ends), "tokenizer": self._backend.to_str()})

    def prompt_ids(self, text: str) -> list[int]:
        """Return a text's token ids with the special tokens that the model expects around a prompt."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def token_text(self, token_id: int) -> str:
        """Return one token's text as it appears inside a text; the token may be special."""
        once: str = self._backend.decode([token_id], skip_special_tokens=False)
        # Many decoders strip the space before a first word.
        twice: str = self._backend.decode([token_id, token_id], skip_special_tokens=False)
        return twice.removeprefix(once) if twice.startswith(once) else once

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return one token's bytes in UTF-8, which may be a part of a character; None if they are unknown."""
        if (byte := self._byte_of.get(token_id)) is not None:
            return byte
        text = self.token_text(token_id)
        if _UNKNOWN not in text:
            return text.encode()
        name = self._backend.id_to_token(token_id) or ""
        if name and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return None

    def completion(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        markup: Mapping[int, str] = MappingProxyType({}),
    ) -> "CompletionText":
        """Return the text that follows a prompt, up to the stop strings of its sampling.

        `markup` has the names of tokens that are to be in the text, each after MARKUP.
        """
        context = prompt_token_ids[-_CONTEXT_TOKENS:]
        hidden = self.ends | (frozenset(self._specials.values()) - markup.keys() if markup else frozenset())
        stream = TextStream(self._backend, self._byte_of, context, hidden, markup)
        # A special token may have no text, so a stop string that is one is found by its id.
        stop_ids = frozenset(self._specials[stop] for stop in sampling.stop if stop in self._specials)
        return CompletionText(stream, sampling.stop, sampling.min_tokens, stop_ids)


class TextStream:
    """Turns token ids into text as they arrive; the returned text never ends inside a character.

    Bytes that are no character become U+FFFD, and no text that was returned changes later. The tokens in
    `hidden` are left out, and without `markup` all special tokens.
    """

    def __init__(
        self,
        backend: Backend,
        byte_of: Mapping[int, bytes],
        context: Sequence[int],
        hidden: frozenset[int],
        markup: Mapping[int, str],
    ) -> None:
        self._backend = backend
        self._byte_of = byte_of
        self._skips = not markup
        self._hidden = hidden
        self._markup = markup
        # Tokens stand for single bytes only where a vocabulary has no other: a tokenizer decodes a run of
        # them as a whole, and one bad byte would change characters that were returned.
        self._bytes = _Utf8Decoder("replace")
        self._settled = list(context)  # the last tokens whose text was returned
        self._unsettled: list[int] = []  # the tokens after them

    def push(self, token_id: int) -> str:
        """Add the next token and return the new text that is certain now."""
        if token_id in self._hidden:
            return ""
        if (byte := self._byte_of.get(token_id)) is not None:
            text = self._unsettled_text()
            self._settled, self._unsettled = [token_id], []
            return text + self._bytes.decode(byte)
        unfinished = self._bytes.decode(b"", final=True)
        self._unsettled.append(token_id)
        text = self._unsettled_text()
        is_open = not text or text.endswith(_UNKNOWN)
        if is_open and len(self._unsettled) < _MOST_UNSETTLED:
            return unfinished
        self._settled, self._unsettled = self._unsettled if text else self._settled, []
        name = self._markup.get(token_id, "")
        if name and text.endswith(name):
            text = f"{text.removesuffix(name)}{MARKUP}{name}"
        return unfinished + text

    def finish(self) -> str:
        """Return the text that was held back; the start of an unfinished character becomes U+FFFD."""
        text = self._unsettled_text() + self._bytes.decode(b"", final=True)
        self._unsettled = []
        return text

    def _unsettled_text(self) -> str:
        if not self._unsettled:
            return ""
        before = self._decode(self._settled)
        text = self._decode(self._settled + self._unsettled)
        # A text that does not go on as it began, such as " '" that becomes "'", is decoded without what was.
        return text[len(before) :] if text.startswith(before) else self._decode(self._unsettled)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=self._skips)
        return text


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function that the model asks for; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The new text of one choice of an answer.

    `token_offsets` holds, for each token that `text` completes, its offset in the choice's whole text. The
    tokens are the choice's next ones, in order, without tokens that have text of a stop string. `token_ids`,
    `logprobs` and `top_logprobs` (best first) are parallel to it if the job asked for log probabilities, else
    empty. `reasoning` and `tool_calls` were parsed out of the text; `num_calls` counts the choice's calls up
    to here. With a `finish_reason` this is the choice's last delta. `after` counts the job's completion
    tokens up to here: a reader that returns continues after them.
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

    @classmethod
    def of(cls, parts: Sequence["TextDelta"]) -> "TextDelta":
        """Return consecutive deltas of one choice as one."""
        return replace(
            parts[-1],
            text="".join(part.text for part in parts),
            token_offsets=_chained(part.token_offsets for part in parts),
            token_ids=_chained(part.token_ids for part in parts),
            logprobs=_chained(part.logprobs for part in parts),
            top_logprobs=_chained(part.top_logprobs for part in parts),
            reasoning="".join(part.reasoning for part in parts),
            tool_calls=_chained(part.tool_calls for part in parts),
        )


class CompletionText:
    """The text of one completion, up to the first stop string or token of `stop_ids`.

    A stop string that is complete before the completion has `min_tokens` tokens is ordinary text. Text that
    may become a stop string is held back until later tokens decide.
    """

    def __init__(
        self,
        decoder: TextStream,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decoder = decoder
        self._stop_ids = stop_ids
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_decoded = 0
        self._num_returned = 0
        self._held = ""
        # The begin and end of each token's text, for tokens that are not returned yet.
        self._pending: deque[tuple[int, int]] = deque()
        self.stopped = False

    def ends_with(self, token_id: int) -> bool:
        """Add the next token and say whether a stop string is complete now."""
        self.push(token_id)
        return self.stopped

    def push(self, token_id: int) -> TextDelta:
        """Add the next token and return the text that is certain now."""
        if self.stopped:
            return TextDelta()
        self._num_tokens += 1
        if token_id in self._stop_ids and self._num_tokens >= self._min_tokens:
            last = self.finish()
            self.stopped = True
            return last
        begin = self._num_decoded
        self._add(self._decoder.push(token_id))
        self._pending.append((begin, self._num_decoded))
        if self._num_tokens >= self._min_tokens and (end := self._first_stop()) is not None:
            return self._end_at(end)
        return self._return(len(self._held) - self._num_undecided())

    def finish(self) -> TextDelta:
        """Return the rest of a completion that has ended."""
        if self.stopped:
            return TextDelta()
        self._add(self._decoder.finish())
        if self._num_tokens >= self._min_tokens and (end := self._first_stop()) is not None:
            return self._end_at(end)
        rest = tuple(begin for begin, _ in self._pending)
        return TextDelta(self._held, rest)

    def _add(self, text: str) -> None:
        self._held += text
        self._num_decoded += len(text)

    def _end_at(self, end: int) -> TextDelta:
        self.stopped = True
        return self._return(end)

    def _return(self, num_characters: int) -> TextDelta:
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        self._num_returned += num_characters
        offsets = []
        while self._pending and self._is_returned(*self._pending[0]):
            offsets.append(self._pending.popleft()[0])
        return TextDelta(text, tuple(offsets))

    def _is_returned(self, begin: int, end: int) -> bool:
        # A token without text, such as a part of a character, waits for the text after it.
        return begin < self._num_returned and end <= self._num_returned

    def _first_stop(self) -> int | None:
        plain = self._held.replace(MARKUP, "")
        found = [at for stop in self._stop if (at := plain.find(stop)) >= 0]
        return self._place(min(found)) if found else None

    def _place(self, num_characters: int) -> int:
        """Return how much of the held text has so many characters beside MARKUP, which no stop string has."""
        if MARKUP not in self._held or not num_characters:
            return num_characters
        places = (place for place, one in enumerate(self._held, 1) if one != MARKUP)
        return next(islice(places, num_characters - 1, None))

    def _num_undecided(self) -> int:
        """Return how many characters at the end are the beginning of a stop string."""
        plain = self._held.replace(MARKUP, "")
        longest = min(len(plain), max(map(len, self._stop), default=0))
        ends = (length for length in range(longest, 0, -1) if self._may_stop(plain[-length:]))
        length = next(ends, 0)
        return len(self._held) - self._place(len(plain) - length) if length else 0

    def _may_stop(self, end: str) -> bool:
        return any(len(end) < len(stop) and stop.startswith(end) for stop in self._stop)


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """The new parts of an answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def _chained(parts: Iterable[tuple[_Item, ...]]) -> tuple[_Item, ...]:
    return tuple(chain.from_iterable(parts))


def _byte_tokens(backend: Backend) -> dict[int, bytes]:
    """Return the tokens that stand for single bytes, where the decoder takes them so."""
    names = {f"<0x{byte:02X}>": bytes((byte,)) for byte in range(256)}
    found = ((backend.token_to_id(name), name, byte) for name, byte in names.items())
    return {
        token_id: byte
        for token_id, name, byte in found
        if token_id is not None and backend.decode([token_id], skip_special_tokens=False) != name
    }


def joined(parts: Iterable[ParsedAnswer]) -> ParsedAnswer:
    """Return consecutive parts of an answer as one."""
    found = list(parts)
    return ParsedAnswer(
        content="".join(part.content for part in found),
        reasoning="".join(part.reasoning for part in found),
        tool_calls=tuple(call for part in found for call in part.tool_calls),
    )


def _byte_alphabet() -> dict[str, int]:
    """Return character -> byte as byte-level tokenizers write bytes: GPT-2's table, which all of them use."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
