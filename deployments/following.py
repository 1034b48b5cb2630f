"""A job's stream of tokens as the texts of its choices."""

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace

from azu.engine.completion_text import CompletionText, Piece
from azu.engine.text_decoder import TextDecoder
from azu.jobs.redis import RedisJobs
from azu.protocol.job import FinishReason, Job, JobOutcome, JobState, TokenEvent
from deployments.answers import Part, TokenScore, joined


async def follow(
    jobs: RedisJobs, job: Job, decoder: TextDecoder, after: int = 0, *, raw: bool = False
) -> AsyncIterator[Part | JobOutcome]:
    """Yield what a job's choices show behind completion token `after`, at last its outcome.

    The tokens before are read too: what was held back of them is shown with those that follow. `raw` texts
    have special tokens in them.
    """
    choices = [
        _Choice(index, decoder.completion(job.prompt_token_ids, job.sampling, raw=raw))
        for index in range(job.choices)
    ]
    async for event in jobs.events(job.job_id):
        if isinstance(event, TokenEvent):
            for part in choices[event.choice].take(event):
                if part.after > after:
                    yield part
                elif part.after == after and part.finish_reason is not None:
                    # Its reader may have got the last token and not that it was the last.
                    yield replace(part, text="", scores=())
            continue
        for choice in choices:
            # A choice that was cut off shows what it has; one that failed is followed by the error.
            if not choice.ended and event.state is not JobState.FAILED:
                yield choice.end(event.finish_reason)
        yield event


class _Choice:
    """One of the texts that a job makes."""

    def __init__(self, index: int, text: CompletionText) -> None:
        self._index = index
        self._text = text
        self._unsettled: deque[tuple[int, float, tuple[tuple[int, float], ...]]] = deque()
        self._after = 0
        self.ended = False

    def take(self, event: TokenEvent) -> list[Part]:
        """Take new tokens and return what they show."""
        self._unsettled += zip(event.token_ids, event.logprobs, event.top_logprobs, strict=False)
        parts: list[Part] = []
        for token_id in event.token_ids:
            self._after = event.index + len(parts) + 1
            parts.append(self._part(self._text.push(token_id)))
        if event.finish_reason is not None:
            # With the last token comes all that was held back: nothing is shown behind the last `after`.
            parts.append(joined(parts.pop(), self.end(event.finish_reason)))
        return [part for part in parts if part.text or part.scores or part.finish_reason]

    def end(self, reason: FinishReason) -> Part:
        """Return the last part."""
        self.ended = True
        return self._part(self._text.finish(), reason)

    def _part(self, piece: Piece, reason: FinishReason | None = None) -> Part:
        scores: tuple[TokenScore, ...] = ()
        if self._unsettled:
            scores = tuple(TokenScore(*self._unsettled.popleft(), offset) for offset in piece.token_offsets)
        return Part(self._index, piece.text, scores, reason, self._after)
