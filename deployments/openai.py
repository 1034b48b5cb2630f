"""OpenAI's request schema to our sampling, and our tokens to OpenAI's answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from azu.errors import InvalidRequest
from azu.protocol.job import FinishReason, Receipt

# Parameters azu does not have, with the values that ask for nothing: others would change the output.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logprobs": (None, False, 0),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "stop": (None, [], ""),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Parameters that change nothing about the text.
_IGNORED = frozenset(
    {
        "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier",
        "store", "user",
    }
)  # fmt: skip


def _finite_text(text: Any) -> Any:
    # A lone surrogate is no character: it cannot be written down or tokenised.
    if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not valid Unicode")
    return text


Text = Annotated[str, BeforeValidator(_finite_text)]


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Generation(BaseModel):
    """What chat and plain completions share. None means: the model's own default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_missing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name in _NEUTRAL.keys() & body.keys():
            if not any(body[name] == value and type(body[name]) is type(value) for value in _NEUTRAL[name]):
                raise InvalidRequest(
                    f"{name} is not supported with this value", param=name, code="unsupported_parameter"
                )
        return {key: value for key, value in body.items() if key not in _NEUTRAL and key not in _IGNORED}


class TextPart(BaseModel):
    """A text part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(default=None, ge=1)


class CompletionRequest(_Generation):
    """POST /v1/completions: the prompt is taken as it is."""

    prompt: Text = Field(min_length=1)


def usage(prompt_tokens: int, completion_tokens: int, receipt: Receipt | None) -> dict[str, int]:
    """Return OpenAI's usage with the charge beside it."""
    counted = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return counted if receipt is None else counted | {"cost_lamports": receipt.charged_lamports}


def finish_reason(reason: FinishReason) -> str:
    """Return OpenAI's word; a cancelled text just stops."""
    return FinishReason.LENGTH.value if reason is FinishReason.LENGTH else FinishReason.STOP.value


class Answer:
    """The objects of one answer, whole or as chunks of a stream."""

    def __init__(self, *, chat: bool, job_id: str, model: str, created_s: int) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{job_id}",
            "created": created_s,
            "model": model,
            "azu": {"job_id": job_id},
        }

    def whole(self, text: str, reason: FinishReason, counted: dict[str, int]) -> dict[str, Any]:
        """Return the answer in one piece."""
        body: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self._chat
            else {"text": text}
        )
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": finish_reason(reason)}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": counted}

    def opening(self) -> dict[str, Any] | None:
        """Return the chunk before the first piece; only chats have one."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self._chat else None

    def piece(self, text: str) -> dict[str, Any]:
        """Return a chunk with a piece of text."""
        return self._chunk({"delta": {"content": text}} if self._chat else {"text": text}, None)

    def closing(self, reason: FinishReason) -> dict[str, Any]:
        """Return the chunk that ends the text."""
        return self._chunk({"delta": {}} if self._chat else {"text": ""}, finish_reason(reason))

    def usage_chunk(self, counted: dict[str, int]) -> dict[str, Any]:
        """Return the chunk that carries the usage: it has no choices."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": counted}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, body: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}
