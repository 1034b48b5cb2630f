"""OpenAI's requests: what azu takes of them, and by which name it refuses the rest."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from azu.errors import InvalidRequest

# Parameters azu does not have, with the values that ask for nothing: others would change the output.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
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


_MAX_CHOICES = 128
_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_TOP_LOGPROBS = 20


def _finite_text(text: Any) -> Any:
    # A lone surrogate is no character: it cannot be written down or tokenised.
    if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not valid Unicode")
    return text


def _stop_strings(stop: Any) -> Any:
    """Take one stop string for a list of one; an empty one asks for nothing."""
    if stop is None or stop == "":
        return []
    return [stop] if isinstance(stop, str) else stop


Text = Annotated[str, BeforeValidator(_finite_text)]
StopString = Annotated[Text, Field(min_length=1, max_length=_MAX_STOP_CHARACTERS)]


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
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES)
    stop: Annotated[list[StopString], BeforeValidator(_stop_strings)] = Field(
        default=[], max_length=_MAX_STOPS
    )
    stop_token_ids: list[int] | None = Field(default=None, max_length=_MAX_STOPS)
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
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to say beside each token's own log probability, None for neither."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None


class CompletionRequest(_Generation):
    """POST /v1/completions: the prompt is taken as it is."""

    prompt: Text = Field(min_length=1)
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to say beside each token's own log probability, None for neither."""
        return self.logprobs
