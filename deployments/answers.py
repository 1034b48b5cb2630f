"""From a job's token events to OpenAI's answers, whole or as the chunks of a stream.

`follow` turns TokenEvents into TextDeltas, with reasoning and tool calls parsed out of their text, and
AnswerFormatter makes answers and chunks of them.
"""

from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from azu.api.jobs import Phase
from azu.api.openai import (
    AlternativeToken,
    AnsweredCall,
    AnswerMessage,
    AzuFields,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChosenToken,
    ChunkCall,
    Delta,
    FunctionCall,
    TextChoice,
    TextChunk,
    TextCompletion,
    TextLogprobs,
    Usage,
)
from azu.api.receipts import ReceiptLines
from azu.engine.text import CompletionText, TextDecoder, TextDelta, joined
from azu.jobs.redis import RedisJobs
from azu.protocol.job import FinishReason, Job, JobOutcome, JobState, Receipt, TokenEvent
from azu.protocol.phase import JobPhase

if TYPE_CHECKING:
    from azu.engine.tokenizer import AnswerParser, Tokenizer

# JSON has no infinity; OpenAI writes this for a token that is next to impossible.
_LOWEST_LOGPROB = -9999.0


async def follow(
    jobs: RedisJobs,
    job: Job,
    tokenizer: "Tokenizer",
    after: int = 0,
    parsers: "Sequence[AnswerParser]" = (),
) -> AsyncIterator[TextDelta | JobOutcome]:
    """Yield what is new of a job's choices behind completion token `after`, and at last the job's outcome.

    The tokens before `after` are read too: their text that was held back is shown with the tokens that
    follow. `parsers`, one for each choice, take reasoning and tool calls out of the texts.
    """
    markup = tokenizer.markup if parsers else {}
    choices = [
        _Choice(
            index,
            tokenizer.completion(job.prompt_token_ids, job.sampling, markup),
            parsers[index] if parsers else None,
        )
        for index in range(job.choices)
    ]
    async for event in jobs.events(job.job_id):
        if isinstance(event, TokenEvent):
            for delta in choices[event.choice].take(event):
                if delta.after > after:
                    yield delta
                elif delta.after == after and delta.finish_reason is not None:
                    # The reader may have the last token without knowing that it was the last.
                    yield TextDelta(
                        choice=delta.choice, num_calls=delta.num_calls,
                        finish_reason=delta.finish_reason, after=delta.after,
                    )  # fmt: skip
            continue
        for choice in choices:
            # A choice that was cut off shows what it has; after one that failed comes the error.
            if not choice.ended and event.state is not JobState.FAILED:
                yield choice.end(event.finish_reason)
        yield event


class _Choice:
    """The text of one of a job's choices, as its tokens come."""

    def __init__(self, index: int, text: CompletionText, parser: "AnswerParser | None") -> None:
        self._index = index
        self._text = text
        self._parser = parser
        self._num_calls = 0
        # Tokens with log probabilities whose text is held back.
        self._unsettled: deque[tuple[int, float, tuple[tuple[int, float], ...]]] = deque()
        self._after = 0
        self.ended = False

    def take(self, event: TokenEvent) -> list[TextDelta]:
        """Take new tokens and return what they show."""
        self._unsettled += zip(event.token_ids, event.logprobs, event.top_logprobs, strict=False)
        deltas: list[TextDelta] = []
        for token_id in event.token_ids:
            self._after = event.index + len(deltas) + 1
            deltas.append(self._completed(self._text.push(token_id)))
        if event.finish_reason is not None:
            # The last token's delta has all text that was held back: nothing follows the last `after`.
            deltas.append(TextDelta.of((deltas.pop(), self._last(event.finish_reason))))
        return [
            self._parsed(delta) for delta in deltas if delta.text or delta.logprobs or delta.finish_reason
        ]

    def end(self, reason: FinishReason) -> TextDelta:
        """Return the last delta of a choice that was cut off."""
        return self._parsed(self._last(reason))

    def _parsed(self, delta: TextDelta) -> TextDelta:
        if self._parser is None:
            return delta
        new = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            new = joined((new, self._parser.finish()))
        self._num_calls += len(new.tool_calls)
        return replace(
            delta,
            text=new.content,
            reasoning=new.reasoning,
            tool_calls=new.tool_calls,
            num_calls=self._num_calls,
        )

    def _last(self, reason: FinishReason) -> TextDelta:
        self.ended = True
        return self._completed(self._text.finish(), reason)

    def _completed(self, delta: TextDelta, reason: FinishReason | None = None) -> TextDelta:
        """Return a delta of the text with what the text does not know of its choice."""
        found = [self._unsettled.popleft() for _ in delta.token_offsets] if self._unsettled else []
        return replace(
            delta,
            choice=self._index,
            token_ids=tuple(token_id for token_id, _, _ in found),
            logprobs=tuple(logprob for _, logprob, _ in found),
            top_logprobs=tuple(top for _, _, top in found),
            finish_reason=reason,
            after=self._after,
        )


class AnswerFormatter:
    """Makes the objects of one job's answer. `decoder` writes tokens as text for log probabilities."""

    def __init__(
        self, *, chat: bool, job_id: str, model: str, created_s: int, decoder: TextDecoder | None = None
    ) -> None:
        self._chat = chat
        self._decoder = decoder
        self._call_prefix = f"call_{job_id.removeprefix('job-')}"
        self._azu = AzuFields(job_id=job_id)
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{job_id}",
            "created": created_s,
            "model": model,
        }

    def whole(self, choices: Sequence[TextDelta], usage: Usage) -> ChatCompletion | TextCompletion:
        """Return the answer in one piece."""
        if self._chat:
            found = tuple(self._chat_choice(choice) for choice in choices)
            return ChatCompletion(**self._head, azu=self._azu, choices=found, usage=usage)
        texts = tuple(
            self._text_choice(choice, finish_reason(choice.finish_reason or FinishReason.STOP))
            for choice in choices
        )
        return TextCompletion(**self._head, azu=self._azu, choices=texts, usage=usage)

    def opening(self, choice: int) -> ChatChunk | None:
        """Return the chunk before a choice's first text; only chats have one."""
        return self._chat_chunk(choice, Delta(role="assistant", content="")) if self._chat else None

    def chunks(self, delta: TextDelta) -> list[ChatChunk | TextChunk]:
        """Return the chunks for what is new of a choice."""
        return list(self._chat_chunks(delta) if self._chat else self._text_chunks(delta))

    def usage_chunk(self, usage: Usage, receipt: ReceiptLines | None = None) -> ChatChunk | TextChunk:
        """Return the chunk that carries the usage and perhaps the receipt: it has no choices."""
        kind = ChatChunk if self._chat else TextChunk
        azu = AzuFields(job_id=self._azu.job_id, receipt=receipt)
        return kind(**self._head, azu=azu, choices=(), usage=usage)

    def _chat_choice(self, choice: TextDelta) -> ChatChoice:
        calls = tuple(AnsweredCall(id=call.id, function=call.function) for call in self._calls(choice))
        message = AnswerMessage(
            content=choice.text or None if calls else choice.text,
            tool_calls=calls or None,
            reasoning_content=choice.reasoning or None,
        )
        return ChatChoice(
            index=choice.choice,
            message=message,
            logprobs=self._chat_logprobs(choice),
            finish_reason=finish_reason(choice.finish_reason or FinishReason.STOP, choice.num_calls),
        )

    def _text_choice(self, delta: TextDelta, reason: str | None) -> TextChoice:
        return TextChoice(
            index=delta.choice, text=delta.text, logprobs=self._text_logprobs(delta), finish_reason=reason
        )

    def _chat_chunks(self, delta: TextDelta) -> list[ChatChunk]:
        chunks, choice, after = [], delta.choice, delta.after
        if delta.text or delta.logprobs or delta.reasoning or delta.tool_calls:
            # One chunk, so that a reader has all that comes with a token or nothing of it.
            new = Delta(
                content=delta.text if delta.text or delta.logprobs else None,
                reasoning_content=delta.reasoning or None,
                tool_calls=self._calls(delta) or None,
            )
            chunks.append(self._chat_chunk(choice, new, self._chat_logprobs(delta), after=after))
        if delta.finish_reason is not None:
            reason = finish_reason(delta.finish_reason, delta.num_calls)
            chunks.append(self._chat_chunk(choice, Delta(), reason=reason, after=after))
        return chunks

    def _text_chunks(self, delta: TextDelta) -> list[TextChunk]:
        choices = []
        if delta.text or delta.logprobs:
            choices.append(self._text_choice(delta, None))
        if delta.finish_reason is not None:
            ended = TextDelta(choice=delta.choice)
            choices.append(self._text_choice(ended, finish_reason(delta.finish_reason)))
        azu = AzuFields(job_id=self._azu.job_id, after=delta.after)
        return [TextChunk(**self._head, azu=azu, choices=(choice,)) for choice in choices]

    def _chat_chunk(
        self,
        choice: int,
        delta: Delta,
        logprobs: ChatLogprobs | None = None,
        reason: str | None = None,
        after: int = 0,
    ) -> ChatChunk:
        new = ChatChunkChoice(index=choice, delta=delta, logprobs=logprobs, finish_reason=reason)
        azu = AzuFields(job_id=self._azu.job_id, after=after)
        return ChatChunk(**self._head, azu=azu, choices=(new,))

    def _calls(self, delta: TextDelta) -> tuple[ChunkCall, ...]:
        """Return a delta's tool calls with their places among the choice's."""
        first = delta.num_calls - len(delta.tool_calls)
        return tuple(
            ChunkCall(
                index=index,
                id=f"{self._call_prefix}_{delta.choice}_{index}",
                function=FunctionCall(name=call.name, arguments=call.arguments),
            )
            for index, call in enumerate(delta.tool_calls, first)
        )

    def _chat_logprobs(self, delta: TextDelta) -> ChatLogprobs | None:
        decoder = self._decoder
        if not delta.logprobs or decoder is None:
            return None

        def token(token_id: int, logprob: float) -> dict[str, Any]:
            content = decoder.token_bytes(token_id)
            return {
                "token": decoder.token_text(token_id),
                "logprob": max(logprob, _LOWEST_LOGPROB),
                "bytes": None if content is None else tuple(content),
            }

        return ChatLogprobs(
            content=tuple(
                ChosenToken(
                    **token(token_id, logprob),
                    top_logprobs=tuple(AlternativeToken(**token(*other)) for other in top),
                )
                for token_id, logprob, top in zip(
                    delta.token_ids, delta.logprobs, delta.top_logprobs, strict=True
                )
            )
        )

    def _text_logprobs(self, delta: TextDelta) -> TextLogprobs | None:
        decoder = self._decoder
        if not delta.logprobs or decoder is None:
            return None
        return TextLogprobs(
            tokens=tuple(_spelled(decoder, token_id) for token_id in delta.token_ids),
            token_logprobs=tuple(max(logprob, _LOWEST_LOGPROB) for logprob in delta.logprobs),
            top_logprobs=tuple(_by_text(decoder, top) for top in delta.top_logprobs),
            text_offset=delta.token_offsets,
        )


def _by_text(decoder: TextDecoder, top: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Return log probabilities by the tokens' texts, best first; of equal texts the best stays."""
    found: dict[str, float] = {}
    for token_id, logprob in top:
        found.setdefault(_spelled(decoder, token_id), max(logprob, _LOWEST_LOGPROB))
    return found


def _spelled(decoder: TextDecoder, token_id: int) -> str:
    r"""Return a token's text; a part of a character is spelled in bytes as OpenAI does: bytes:\xe2."""
    text = decoder.token_text(token_id)
    content = decoder.token_bytes(token_id) if "\ufffd" in text else None
    return text if content is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def finish_reason(reason: FinishReason, num_calls: int = 0) -> str:
    """Return OpenAI's word for why a choice ended; a cancelled text ends with "stop"."""
    if num_calls and reason is FinishReason.STOP:
        return "tool_calls"
    return FinishReason.LENGTH.value if reason is FinishReason.LENGTH else FinishReason.STOP.value


def phase_line(phase: JobPhase | None) -> Phase | None:
    """Return where a job stands as the network says it."""
    return None if phase is None else Phase.model_validate(phase)


def usage_of(prompt_tokens: int, completion_tokens: int, receipt: Receipt | None) -> Usage:
    """Return OpenAI's usage, with the charge beside it once there is a receipt."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        cost_lamports=None if receipt is None else receipt.charged_lamports,
    )
