"""The canary: prompts that every placement of a model has to continue with the same tokens. No torch here.

Devices round differently, so only tokens count that are much likelier than any other.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ConfigDict

from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import Sequence as EngineSequence
from azu.errors import AzuError
from azu.protocol.job import TokenEvent
from azu.protocol.sampling import SamplingParams

# Patterns: a model is rarely in doubt how one goes on.
TEXTS = (
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,",
    "Monday, Tuesday, Wednesday, Thursday,",
    "one two three one two three one two three one two",
    "The cat sat on the mat. The cat sat on the mat. The cat sat on the",
)
_NEW_TOKENS = 8
# The natural logarithm of how much likelier a token has to be than the next one. In half precision devices
# differ by about a tenth.
_CLEAR = 1.0
# With fewer clear tokens an answer says nothing of who computed it.
_LEAST_CLEAR = 4


@dataclass(frozen=True, slots=True)
class CanaryAnswer:
    """The greedy tokens after each prompt, and by how much each was likelier than the next one."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    tokens: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]

    @property
    def is_clear(self) -> bool:
        """Whether enough tokens are clear for a comparison."""
        return sum(map(len, self._clear())) >= _LEAST_CLEAR

    def agrees(self, other: "CanaryAnswer") -> bool:
        """Say whether another answer has the tokens that are clear here."""
        clear = self._clear()
        return len(clear) == len(other.tokens) and all(
            tuple(theirs[: len(ours)]) == ours for ours, theirs in zip(clear, other.tokens, strict=True)
        )

    def _clear(self) -> list[tuple[int, ...]]:
        """Return the tokens of each answer before the first in doubt: from there on all may differ."""
        clear = []
        for tokens, margins in zip(self.tokens, self.margins, strict=True):
            doubtful = (place for place, margin in enumerate(margins) if margin < _CLEAR)
            clear.append(tokens[: next(doubtful, len(tokens))])
        return clear


@dataclass(slots=True)
class _Asked:
    """The canary's prompts on their way, by sequence id."""

    ended: asyncio.Future[None]
    events: dict[int, list[TokenEvent]] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)


class Canary:
    """Continues the canary's prompts in an engine, behind all sequences of jobs; nothing is paid for it."""

    def __init__(
        self, engine: EnginePipeline, sequence_ids: Iterator[int], on_change: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._sequence_ids = sequence_ids
        self._on_change = on_change
        self._asked: dict[int, _Asked] = {}  # by sequence id

    async def ask(self, prompts: Sequence[Sequence[int]]) -> CanaryAnswer:
        """Return how prompts go on; raises an AzuError when one of them fails."""
        asked = _Asked(asyncio.get_running_loop().create_future())
        try:
            for prompt in prompts:
                sequence_id = next(self._sequence_ids)
                sampling = SamplingParams(max_tokens=_NEW_TOKENS, ignore_eos=True, logprobs=2)
                self._engine.add(EngineSequence(sequence_id, tuple(prompt), sampling, is_background=True))
                self._asked[sequence_id] = asked
                asked.events[sequence_id] = []
                asked.open.add(sequence_id)
            self._on_change()
            if prompts:
                await asked.ended
        finally:
            for sequence_id in asked.events:
                self._engine.cancel(sequence_id)
                del self._asked[sequence_id]
        answers = asked.events.values()
        return CanaryAnswer(
            tuple(tuple(event.token_ids[0] for event in events) for events in answers),
            tuple(tuple(_margin(event) for event in events) for events in answers),
        )

    def take(self, events: Mapping[int, TokenEvent]) -> dict[int, TokenEvent]:
        """Take the canary's events, and return the others."""
        for sequence_id in events.keys() & self._asked.keys():
            self._take(sequence_id, events[sequence_id])
        return {key: event for key, event in events.items() if key not in self._asked}

    def fail(self, error: AzuError) -> None:
        """End what runs."""
        for asked in self._asked.values():
            if not asked.ended.done():
                asked.ended.set_exception(error)

    def _take(self, sequence_id: int, event: TokenEvent) -> None:
        asked = self._asked[sequence_id]
        if asked.ended.done():
            return
        if event.error is not None:
            asked.ended.set_exception(event.error)
            return
        asked.events[sequence_id].append(event)
        if event.finish_reason is not None:
            asked.open.discard(sequence_id)
            if not asked.open:
                asked.ended.set_result(None)


def _margin(event: TokenEvent) -> float:
    best, *others = (logprob for _, logprob in event.top_logprobs[0])
    return best - max(others, default=best)
