"""OpenAI's endpoints: the requests that azu takes, and the answers, whole or as the chunks of a stream.

A parameter that azu lacks is refused by its name, unless its value changes nothing.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from azu.api.base import OrAbsent, RequestModel, ResponseModel
from azu.api.receipts import ReceiptLines
from azu.errors import InvalidRequest

# Parameters that azu lacks, with the values that change nothing; any other value is refused.
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
# A stream has it before its first chunk comes.
JOB_ID_HEADER = "x-job-id"


def finite_text(text: Any) -> Any:
    """Refuse a lone surrogate: it is no character, so UTF-8 cannot encode it and no tokenizer takes it."""
    if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not valid Unicode")
    return text


Text = Annotated[str, BeforeValidator(finite_text)]


class TextPart(RequestModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: Text


class CalledFunction(RequestModel):
    """A function that the model called; `arguments` is a JSON object as text."""

    name: Text = Field(min_length=1, max_length=64)
    arguments: Text

    def for_template(self) -> dict[str, Any]:
        """Return the call as chat templates take it: its arguments as values."""
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


class MadeCall(RequestModel):
    """A call in an earlier answer."""

    id: Text = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(RequestModel):
    """One turn of a chat; a client may send an earlier answer of azu back as it was."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = Field(default=None, max_length=256)
    tool_calls: list[MadeCall] | None = None
    tool_call_id: Text | None = Field(default=None, max_length=128)
    reasoning_content: Text | None = None
    # An answer of azu or of OpenAI has these, empty.
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
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content or ()]
        turn["content"] = "".join(parts)
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                turn[name] = value
        if self.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.for_template()}
                for call in self.tool_calls
            ]
        return turn


def _writable(schema: Any) -> Any:
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("cannot be written as JSON") from error
    return schema


Schema = Annotated[dict[str, Any], BeforeValidator(_writable)]


class ToolFunction(RequestModel):
    """The name, purpose and JSON schema of a function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    parameters: Schema | None = None
    strict: Literal[False] | None = None


class Tool(RequestModel):
    """A function that the model may call. azu does not hold its arguments to the schema (`strict`)."""

    type: Literal["function"]
    function: ToolFunction

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates take it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {
            "type": "function",
            "function": {"parameters": {"type": "object", "properties": {}}} | function,
        }


def _not_forced(choice: Any) -> Any:
    # Nothing in azu forces what a model writes.
    if choice in (None, "auto", "none"):
        return choice
    raise InvalidRequest(
        "the model may call a tool (auto) or not (none); it cannot be made to",
        param="tool_choice",
        code="unsupported_parameter",
    )


ToolChoice = Annotated[Literal["auto", "none"] | None, BeforeValidator(_not_forced)]


def _stop_strings(stop: Any) -> Any:
    """Return a list of stop strings; one string is a list of one, and an empty one is none."""
    if stop is None or stop == "":
        return []
    return [stop] if isinstance(stop, str) else stop


StopString = Annotated[Text, Field(min_length=1)]
StopStrings = Annotated[
    list[StopString], BeforeValidator(_stop_strings, json_schema_input_type=list[StopString] | str | None)
]


def _one_prompt(prompt: Any) -> Any:
    """Return one prompt, a text or a list of token ids; a list of one prompt stands for it."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    is_tokens = isinstance(prompt, list) and all(type(token_id) is int for token_id in prompt)
    if not prompt or not (is_tokens or isinstance(prompt, str)):
        raise ValueError("must be one text or one list of token ids, and not empty")
    return finite_text(prompt)


Prompt = Annotated[str | list[int], BeforeValidator(_one_prompt)]


class StreamOptions(RequestModel):
    """OpenAI's stream_options, and azu's `include_receipt`: the last chunk has the usage and the receipt."""

    include_usage: bool = False
    include_obfuscation: bool = False
    include_receipt: bool = False


class _SamplingRequest(RequestModel):
    """The parameters that chat and plain completions share. None stands for the model's own default."""

    model: Text = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool = False
    n: int | None = Field(default=None, ge=1)
    stop: StopStrings = Field(default_factory=list)
    stop_token_ids: list[int] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name in _NEUTRAL.keys() & body.keys():
            if not any(body[name] == value and type(body[name]) is type(value) for value in _NEUTRAL[name]):
                raise InvalidRequest(
                    f"{name} is not supported with this value", param=name, code="unsupported_parameter"
                )
        return {key: value for key, value in body.items() if key not in _NEUTRAL and key not in _IGNORED}


class ChatRequest(_SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _refuse_beside_tools(self) -> Self:
        if self.offered_tools:
            # Nothing in azu keeps the model to one call, and a call has no log probability of its own.
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
        """The tools that the prompt lists, as the model's template takes them."""
        if self.tool_choice == "none":
            return []
        return [tool.for_template() for tool in self.tools or ()]

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives go beside each token's log probability; None for no log probabilities."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None


class CompletionRequest(_SamplingRequest):
    """POST /v1/completions: the prompt is taken as it is."""

    prompt: Prompt
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives go beside each token's log probability; None for no log probabilities."""
        return self.logprobs


class Usage(ResponseModel):
    """How many tokens an answer took; `cost_lamports` is there once the job's charge is settled."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cost_lamports: OrAbsent[int] = None


class AzuFields(ResponseModel):
    """What azu adds to OpenAI's answers: the job, and in chunks its completion tokens so far.

    A caller whose stream broke gets the rest from `/v1/jobs/{job_id}/stream` with this `after`. The last
    chunk has the receipt if the caller asked for it.
    """

    job_id: str
    after: OrAbsent[int] = None
    receipt: OrAbsent[ReceiptLines] = None


class _Answer(ResponseModel):
    id: str
    created: int
    model: str
    azu: AzuFields


class AlternativeToken(ResponseModel):
    """A token with its log probability; `bytes` are those of its text in UTF-8, null if unknown."""

    token: str
    logprob: float
    bytes: tuple[int, ...] | None


class ChosenToken(AlternativeToken):
    """A token of an answer with its most probable alternatives, best first."""

    top_logprobs: tuple[AlternativeToken, ...]


class ChatLogprobs(ResponseModel):
    """The log probabilities of a chat's tokens."""

    content: tuple[ChosenToken, ...]
    refusal: None = None


class TextLogprobs(ResponseModel):
    """The log probabilities of a text's tokens, as parallel lists.

    `text_offset` is where each token begins in the text, in characters.
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float, ...]
    top_logprobs: tuple[dict[str, float], ...]
    text_offset: tuple[int, ...]


class FunctionCall(ResponseModel):
    """A call of a function by the model; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class AnsweredCall(ResponseModel):
    """A tool call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChunkCall(AnsweredCall):
    """A tool call in a chunk; `index` is its place among the choice's calls. A chunk holds calls whole."""

    index: int


class AnswerMessage(ResponseModel):
    """The message of a whole chat answer; `content` is null if the answer is tool calls alone."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: OrAbsent[tuple[AnsweredCall, ...]] = None
    reasoning_content: OrAbsent[str] = None


class ChatChoice(ResponseModel):
    """One of the answers to a chat. `finish_reason` is "stop", "length" or "tool_calls"."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(_Answer):
    """A whole chat answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: tuple[ChatChoice, ...]
    usage: Usage


class Delta(ResponseModel):
    """What a chunk adds to a message; the first chunk of a choice has its role."""

    role: OrAbsent[Literal["assistant"]] = None
    content: OrAbsent[str] = None
    reasoning_content: OrAbsent[str] = None
    tool_calls: OrAbsent[tuple[ChunkCall, ...]] = None


class ChatChunkChoice(ResponseModel):
    """What is new of one choice; `finish_reason` is null until the choice's last chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(_Answer):
    """One event of a streamed chat. The chunk with the usage has no choices."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: tuple[ChatChunkChoice, ...]
    usage: OrAbsent[Usage] = None


class TextChoice(ResponseModel):
    """One continuation of a prompt, or in a chunk what is new of it.

    `finish_reason` is "stop" or "length", and null until a choice's last chunk.
    """

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class TextCompletion(_Answer):
    """A whole plain completion."""

    object: Literal["text_completion"] = "text_completion"
    choices: tuple[TextChoice, ...]
    usage: Usage


class TextChunk(_Answer):
    """One event of a streamed plain completion. The chunk with the usage has no choices."""

    object: Literal["text_completion"] = "text_completion"
    choices: tuple[TextChoice, ...]
    usage: OrAbsent[Usage] = None


class ModelLine(ResponseModel):
    """A model of the network; a token costs `lamports_per_token`, prompt and completion alike.

    `state` is that of its deployment ("running", "slow", "broken" or "deploying"), or "ready" where the first
    prompt brings it up. `tokens_per_s` is the speed of one answer as it was measured, null before any was.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str
    context_length: int
    max_model_len: int
    num_layers: int
    lamports_per_token: int
    deployed: bool
    state: str = ""
    tokens_per_s: float | None = None


class ModelList(ResponseModel):
    """The models that are built in or cut."""

    object: Literal["list"] = "list"
    data: tuple[ModelLine, ...]
