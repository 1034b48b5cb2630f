"""A finished answer, and how the chunks of a stream become one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from azu.api.openai import (
    AnsweredCall,
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    TextChoice,
    TextLogprobs,
)
from azu.api.receipts import ReceiptLines
from azu.client.drawing import for_notebook, for_terminal
from azu.client.receipts import difference

if TYPE_CHECKING:
    from rich.console import RenderableType

Choice = TypeVar("Choice", bound=ChatChoice | TextChoice)


@dataclass(frozen=True, slots=True)
class Generation(Generic[Choice]):
    """A finished answer with its receipt. `choices` has all answers to the prompt, the properties the first.

    The receipt says what the network counted and charged; `received_tokens` is what came.
    """

    model: str
    job_id: str
    choices: tuple[Choice, ...]
    receipt: ReceiptLines
    received_tokens: int

    @property
    def message(self) -> AnswerMessage:
        """The answer as a message, which the next request of a chat can contain."""
        choice = self.choices[0]
        return choice.message if isinstance(choice, ChatChoice) else AnswerMessage(content=choice.text)

    @property
    def text(self) -> str:
        """The answer's text, without its reasoning and tool calls."""
        return self.message.content or ""

    @property
    def reasoning(self) -> str:
        """What the model wrote before its answer; empty for models and requests without."""
        return self.message.reasoning_content or ""

    @property
    def tool_calls(self) -> tuple[AnsweredCall, ...]:
        """The calls of the functions that the request offered."""
        return self.message.tool_calls or ()

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: "stop", "length" or "tool_calls"."""
        return self.choices[0].finish_reason or ""

    @property
    def difference(self) -> str | None:
        """How the receipt differs from what came, in words; None if it does not."""
        return difference(self.receipt, self.received_tokens)

    def __rich__(self) -> "RenderableType":
        """Return what rich prints: the answer, who ran which layers, and the cost."""
        return for_terminal(self.message, self.receipt, self.difference)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the same as HTML."""
        return for_notebook(self.message, self.receipt, self.difference)


@dataclass(frozen=True, slots=True)
class Kind(Generic[Choice]):
    """A kind of answer: its endpoint, and what makes a choice of the parts of it that came."""

    path: str
    whole: Callable[[Sequence[Any]], Choice]


def _chat_choice(parts: Sequence[ChatChunkChoice]) -> ChatChoice:
    deltas = [part.delta for part in parts]
    calls = tuple(call for delta in deltas for call in delta.tool_calls or ())
    text = "".join(delta.content or "" for delta in deltas)
    tokens = tuple(token for part in parts if part.logprobs for token in part.logprobs.content)
    message = AnswerMessage(
        content=text or None if calls else text,
        tool_calls=tuple(AnsweredCall(id=call.id, function=call.function) for call in calls) or None,
        reasoning_content="".join(delta.reasoning_content or "" for delta in deltas) or None,
    )
    return ChatChoice(
        index=parts[0].index,
        message=message,
        logprobs=ChatLogprobs(content=tokens) if tokens else None,
        finish_reason=_finish_reason(parts),
    )


def _text_choice(parts: Sequence[TextChoice]) -> TextChoice:
    found = [part.logprobs for part in parts if part.logprobs]
    logprobs = TextLogprobs(
        tokens=tuple(token for one in found for token in one.tokens),
        token_logprobs=tuple(logprob for one in found for logprob in one.token_logprobs),
        top_logprobs=tuple(top for one in found for top in one.top_logprobs),
        text_offset=tuple(offset for one in found for offset in one.text_offset),
    )
    return TextChoice(
        index=parts[0].index,
        text="".join(part.text for part in parts),
        logprobs=logprobs if found else None,
        finish_reason=_finish_reason(parts),
    )


def _finish_reason(parts: Sequence[ChatChunkChoice | TextChoice]) -> str:
    return next((part.finish_reason for part in reversed(parts) if part.finish_reason), "")


CHAT = Kind("/v1/chat/completions", _chat_choice)
TEXT = Kind("/v1/completions", _text_choice)
