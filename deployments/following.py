"""A job's stream of tokens as the texts of its choices."""

from collections import deque
from collections.abc import AsyncIterator

from azu.engine.completion_text import Piece
from azu.engine.text_decoder import TextDecoder
from azu.jobs.redis import RedisJobs
from azu.protocol.job import FinishReason, Job, JobOutcome, JobState, TokenEvent
from deployments.answers import Part, TokenScore


async def follow(jobs: RedisJobs, job: Job, decoder: TextDecoder) -> AsyncIterator[Part | JobOutcome]:
    """Yield what is new of a job's choices, at last its outcome."""
    choices = [_Choice(index, job, decoder) for index in range(job.choices)]
    async for event in jobs.events(job.job_id):
        if isinstance(event, TokenEvent):
            for part in choices[event.choice].take(event):
                yield part
            continue
        for choice in choices:
            # A choice that was cut off shows what it has; one that failed is followed by the error.
            if not choice.ended and event.state is not JobState.FAILED:
                yield choice.end(event.finish_reason)
        yield event


class _Choice:
    """One of the texts that a job makes."""

    def __init__(self, index: int, job: Job, decoder: TextDecoder) -> None:
        self._index = index
        self._text = decoder.completion(job.prompt_token_ids, job.sampling)
        self._unsettled: deque[tuple[int, float, tuple[tuple[int, float], ...]]] = deque()
        self.ended = False

    def take(self, event: TokenEvent) -> list[Part]:
        """Take new tokens and return what they show."""
        self._unsettled += zip(event.token_ids, event.logprobs, event.top_logprobs, strict=False)
        parts = [self._part(self._text.push(token_id)) for token_id in event.token_ids]
        if event.finish_reason is not None:
            parts.append(self.end(event.finish_reason))
        return [part for part in parts if part.text or part.scores or part.finish_reason]

    def end(self, reason: FinishReason) -> Part:
        """Return the last part."""
        self.ended = True
        return self._part(self._text.finish(), reason)

    def _part(self, piece: Piece, reason: FinishReason | None = None) -> Part:
        scores: tuple[TokenScore, ...] = ()
        if self._unsettled:
            scores = tuple(TokenScore(*self._unsettled.popleft(), offset) for offset in piece.token_offsets)
        return Part(self._index, piece.text, scores, reason)
