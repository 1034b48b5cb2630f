"""OpenAI's requests: what azu takes of them, and by which name it refuses the rest."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from azu.errors import InvalidRequest


def finite_text(text: Any) -> Any:
    """Refuse a lone surrogate: it is no character and cannot be written down or tokenised."""
    if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not valid Unicode")
    return text


Text = Annotated[str, BeforeValidator(finite_text)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A text part of a message's content."""

    type: Literal["text"]
    text: Text


class CalledFunction(_Strict):
    """A function that the model called; `arguments` is a JSON object as text."""

    name: Text = Field(min_length=1, max_length=64)
    arguments: Text

    def for_template(self) -> dict[str, Any]:
        """Return it with its arguments as the values they are."""
        return {"name": self.name, "arguments": json.loads(self.arguments)}

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        try:
            is_object = isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise ValueError("arguments is not a JSON object")
        return self


class MadeCall(_Strict):
    """A call in an earlier answer."""

    id: Text = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Strict):
    """One turn of a chat; what clients send back of an answer of ours is taken too."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = Field(default=None, max_length=256)
    tool_calls: list[MadeCall] | None = None
    tool_call_id: Text | None = Field(default=None, max_length=128)
    reasoning_content: Text | None = None
    # What an answer of ours or of OpenAI's says by null or nothing.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[None] | None = Field(default=None, max_length=0)

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant calls tools")
        if (self.tool_call_id is None) != (self.role != "tool"):
            raise ValueError("tool_call_id belongs to the answer of a tool")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        said: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content or ()]
        said["content"] = "".join(parts)
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                said[name] = value
        if self.tool_calls:
            said["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.for_template()}
                for call in self.tool_calls
            ]
        return said


def _not_forced(choice: Any) -> Any:
    # Nothing here keeps a model from writing something else.
    if choice in (None, "auto", "none"):
        return choice
    raise InvalidRequest(
        "the model may call a tool (auto) or not (none); it cannot be made to",
        param="tool_choice",
        code="unsupported_parameter",
    )


ToolChoice = Annotated[Literal["auto", "none"] | None, BeforeValidator(_not_forced)]


def _writable(schema: Any) -> Any:
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("cannot be written down") from error
    return schema


Schema = Annotated[dict[str, Any], BeforeValidator(_writable)]


class _Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    parameters: Schema | None = None
    strict: Literal[False] | None = None


class Tool(BaseModel):
    """A function that the model may call; nothing holds its arguments to a schema (`strict`)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: _Function

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates take it."""
        said = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}} | said}


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
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Parameters that change nothing about the text.
_IGNORED = frozenset(
    {
        "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user",
    }
)  # fmt: skip


_MAX_TOP_LOGPROBS = 20


def _stop_strings(stop: Any) -> Any:
    """Take one stop string for a list of one; an empty one asks for nothing."""
    if stop is None or stop == "":
        return []
    return [stop] if isinstance(stop, str) else stop


StopString = Annotated[Text, Field(min_length=1)]


def _one_prompt(prompt: Any) -> Any:
    """Take a list of one prompt for that prompt, which is a text or a list of token ids."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    is_tokens = isinstance(prompt, list) and all(type(token_id) is int for token_id in prompt)
    if not prompt or not (is_tokens or isinstance(prompt, str)):
        raise ValueError("must be one text or one list of token ids, and not empty")
    return finite_text(prompt)


Prompt = Annotated[str | list[int], BeforeValidator(_one_prompt)]


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
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool = False
    n: int | None = Field(default=None, ge=1)
    stop: Annotated[list[StopString], BeforeValidator(_stop_strings)] = []
    stop_token_ids: list[int] | None = None
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


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _refuse_what_tools_rule_out(self) -> Self:
        if self.offered_tools:
            # Nothing keeps the model to one call, and a call is not the tokens that it was read from.
            for name, value in (("parallel_tool_calls", False), ("logprobs", True)):
                if getattr(self, name) is value:
                    raise InvalidRequest(
                        f"{name} is not supported with this value beside tools",
                        param=name,
                        code="unsupported_parameter",
                    )
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of, as its template takes them."""
        if self.tool_choice == "none":
            return []
        return [tool.for_template() for tool in self.tools or ()]

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

    prompt: Prompt
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to say beside each token's own log probability, None for neither."""
        return self.logprobs
