"""OpenAI's answers, whole or as the chunks of a stream."""

from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from azu.engine.text import CompletionText, TextDecoder, TextDelta, ToolCall
from azu.jobs.redis import RedisJobs
from azu.protocol.job import FinishReason, Job, JobOutcome, JobState, Receipt, TokenEvent

if TYPE_CHECKING:
    from azu.engine.tokenizer import AnswerParser


# JSON has no infinity; OpenAI says this for what is next to impossible.
_LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of a completion with its log probability and those of its alternatives, best first.

    `offset` is where its text begins in the completion's text.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int


def finish_reason(reason: FinishReason, num_calls: int = 0) -> str:
    """Return OpenAI's word; a cancelled text just stops."""
    if num_calls and reason is FinishReason.STOP:
        return "tool_calls"
    return FinishReason.LENGTH.value if reason is FinishReason.LENGTH else FinishReason.STOP.value


@dataclass(frozen=True, slots=True)
class TextPart:
    """What is new of one choice; with a `finish_reason` it was the last of it.

    `after` counts the job's completion tokens up to here: whoever comes back asks for what follows them.
    `num_calls` counts the choice's tool calls up to here, these included.
    """

    choice: int
    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None
    after: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    num_calls: int = 0


def joined(before: TextPart, new: TextPart) -> TextPart:
    """Return two parts of one choice as one."""
    return replace(
        new,
        text=before.text + new.text,
        scores=before.scores + new.scores,
        reasoning=before.reasoning + new.reasoning,
        tool_calls=before.tool_calls + new.tool_calls,
    )


def usage(prompt_tokens: int, completion_tokens: int, receipt: Receipt | None) -> dict[str, int]:
    """Return OpenAI's usage with the charge beside it."""
    counted = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return counted if receipt is None else counted | {"cost_lamports": receipt.charged_lamports}


class AnswerFormatter:
    """The objects of one answer. `decoder` writes tokens as text where log probabilities were asked for."""

    def __init__(
        self, *, chat: bool, job_id: str, model: str, created_s: int, decoder: TextDecoder | None = None
    ) -> None:
        self._chat = chat
        self._decoder = decoder
        self._call_prefix = f"call_{job_id.removeprefix('job-')}"
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{job_id}",
            "created": created_s,
            "model": model,
            "azu": {"job_id": job_id},
        }

    def whole(self, choices: Sequence[TextPart], counted: dict[str, int]) -> dict[str, Any]:
        """Return the answer in one piece."""
        kind = "chat.completion" if self._chat else "text_completion"
        found = [self._whole_choice(choice) for choice in choices]
        return {**self._head, "object": kind, "choices": found, "usage": counted}

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Return the chunk before a choice's first piece; only chats have one."""
        return self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}) if self._chat else None

    def chunks(self, part: TextPart) -> list[dict[str, Any]]:
        """Return the chunks that say what is new of a choice."""
        chunks = []
        if part.reasoning:
            chunks.append(self._chunk(part.choice, {"delta": {"reasoning_content": part.reasoning}}))
        if part.text or part.scores:
            new = {"delta": {"content": part.text}} if self._chat else {"text": part.text}
            chunks.append(self._chunk(part.choice, new, self._logprobs(part.scores), after=part.after))
        if part.tool_calls:
            calls = [{"index": index} | call for index, call in self._calls(part)]
            chunks.append(self._chunk(part.choice, {"delta": {"tool_calls": calls}}, after=part.after))
        if part.finish_reason is not None:
            nothing: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
            reason = finish_reason(part.finish_reason, part.num_calls)
            chunks.append(self._chunk(part.choice, nothing, reason=reason, after=part.after))
        return chunks

    def usage_chunk(self, counted: dict[str, int]) -> dict[str, Any]:
        """Return the chunk that carries the usage: it has no choices."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": counted}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _whole_choice(self, part: TextPart) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": part.text, "refusal": None}
        if part.tool_calls:
            message["content"] = part.text or None
            message["tool_calls"] = [call for _, call in self._calls(part)]
        if part.reasoning:
            message["reasoning_content"] = part.reasoning
        return {
            "index": part.choice,
            **({"message": message} if self._chat else {"text": part.text}),
            "logprobs": self._logprobs(part.scores),
            "finish_reason": finish_reason(part.finish_reason or FinishReason.STOP, part.num_calls),
        }

    def _calls(self, part: TextPart) -> list[tuple[int, dict[str, Any]]]:
        """Return a part's tool calls with their places among the choice's."""
        first = part.num_calls - len(part.tool_calls)
        return [
            (
                index,
                {
                    "id": f"{self._call_prefix}_{part.choice}_{index}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                },
            )
            for index, call in enumerate(part.tool_calls, first)
        ]

    def _chunk(
        self,
        choice: int,
        body: Mapping[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        after: int = 0,
    ) -> dict[str, Any]:
        found = {"index": choice, **body, "logprobs": logprobs, "finish_reason": reason}
        extra = self._head["azu"] | {"after": after}
        return {**self._head, "azu": extra, "object": self._chunk_kind, "choices": [found]}

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not scores or self._decoder is None:
            return None
        return chat_logprobs(scores, self._decoder) if self._chat else text_logprobs(scores, self._decoder)


def chat_logprobs(scores: Sequence[TokenScore], decoder: TextDecoder) -> dict[str, Any]:
    """Return log probabilities as chats have them."""

    def said(token_id: int, logprob: float) -> dict[str, Any]:
        content = decoder.token_bytes(token_id)
        return {
            "token": decoder.token_text(token_id),
            "logprob": max(logprob, _LOWEST_LOGPROB),
            "bytes": None if content is None else list(content),
        }

    tokens = [
        said(score.token_id, score.logprob) | {"top_logprobs": [said(*one) for one in score.top]}
        for score in scores
    ]
    return {"content": tokens, "refusal": None}


def text_logprobs(scores: Sequence[TokenScore], decoder: TextDecoder) -> dict[str, Any]:
    """Return log probabilities as plain completions have them."""
    return {
        "tokens": [decoder.token_text(score.token_id) for score in scores],
        "token_logprobs": [max(score.logprob, _LOWEST_LOGPROB) for score in scores],
        "top_logprobs": [
            {decoder.token_text(token_id): max(logprob, _LOWEST_LOGPROB) for token_id, logprob in score.top}
            for score in scores
        ],
        "text_offset": [score.offset for score in scores],
    }


async def follow(
    jobs: RedisJobs, job: Job, decoder: TextDecoder, after: int = 0, *, raw: bool = False
) -> AsyncIterator[TextPart | JobOutcome]:
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

    def take(self, event: TokenEvent) -> list[TextPart]:
        """Take new tokens and return what they show."""
        self._unsettled += zip(event.token_ids, event.logprobs, event.top_logprobs, strict=False)
        parts: list[TextPart] = []
        for token_id in event.token_ids:
            self._after = event.index + len(parts) + 1
            parts.append(self._part(self._text.push(token_id)))
        if event.finish_reason is not None:
            # With the last token comes all that was held back: nothing is shown behind the last `after`.
            parts.append(joined(parts.pop(), self.end(event.finish_reason)))
        return [part for part in parts if part.text or part.scores or part.finish_reason]

    def end(self, reason: FinishReason) -> TextPart:
        """Return the last part."""
        self.ended = True
        return self._part(self._text.finish(), reason)

    def _part(self, piece: TextDelta, reason: FinishReason | None = None) -> TextPart:
        scores: tuple[TokenScore, ...] = ()
        if self._unsettled:
            scores = tuple(TokenScore(*self._unsettled.popleft(), offset) for offset in piece.token_offsets)
        return TextPart(self._index, piece.text, scores, reason, self._after)


async def with_calls(
    parts: AsyncIterator[TextPart | JobOutcome], parsers: "Sequence[AnswerParser]"
) -> AsyncIterator[TextPart | JobOutcome]:
    """Tell the calls in the texts of a job's choices from the rest; the parsers are the choices' own."""
    counts = [0] * len(parsers)
    async for part in parts:
        if isinstance(part, JobOutcome):
            yield part
            continue
        parser = parsers[part.choice]
        found = [parser.push(part.text)]
        if part.finish_reason is not None:
            found.append(parser.finish())
        calls = tuple(call for one in found for call in one.tool_calls)
        counts[part.choice] += len(calls)
        yield replace(
            part,
            text="".join(one.content for one in found),
            reasoning="".join(one.reasoning for one in found),
            tool_calls=calls,
            num_calls=counts[part.choice],
        )
