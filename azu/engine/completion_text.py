"""A completion's text as its reader may see it: it ends before a stop string, and no part of one leaks."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Decoder(Protocol):
    """Turns token ids into text as they come."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that is certain after these tokens."""

    def finish(self) -> str:
        """Return what was held back."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown, and where in the text each token that is settled with it begins.

    The tokens are the next ones of the completion, in order; those that wrote at a stop string never come.
    """

    text: str = ""
    token_offsets: tuple[int, ...] = ()


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

    def push(self, token_id: int) -> Piece:
        """Take the next token and return what may be shown now."""
        if self.stopped:
            return Piece()
        self._num_tokens += 1
        begin = self._num_decoded
        self._take(self._decoder.push([token_id]))
        self._unsettled.append((begin, self._num_decoded))
        if self._num_tokens >= self._min_tokens and (end := self._first_stop()) is not None:
            return self._end_at(end)
        return self._show(len(self._held) - self._num_undecided())

    def finish(self) -> Piece:
        """Return the rest of a completion that has ended."""
        if self.stopped:
            return Piece()
        self._take(self._decoder.finish())
        if self._num_tokens >= self._min_tokens and (end := self._first_stop()) is not None:
            return self._end_at(end)
        rest = tuple(begin for begin, _ in self._unsettled)
        return Piece(self._held, rest)

    def _take(self, text: str) -> None:
        self._held += text
        self._num_decoded += len(text)

    def _end_at(self, end: int) -> Piece:
        self.stopped = True
        return self._show(end)

    def _show(self, num_characters: int) -> Piece:
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        self._num_shown += num_characters
        settled = []
        while self._unsettled and self._is_shown(*self._unsettled[0]):
            settled.append(self._unsettled.popleft()[0])
        return Piece(text, tuple(settled))

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
