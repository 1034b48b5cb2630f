"""What a request may ask for, by OpenAI's names; the network checks it. None is the model's own default."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class _Parameters(TypedDict, total=False):
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[str, float] | None
    seed: int | None
    min_tokens: int | None
    ignore_eos: bool
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None


class TextParameters(_Parameters, total=False):
    """The parameters of a prompt that is continued as it is; `logprobs` is how many alternatives to show."""

    logprobs: int | None


class ChatParameters(_Parameters, total=False):
    """The parameters of a chat; `tools` are functions that the model may call, as OpenAI describes them."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: Literal["auto", "none"] | None
    parallel_tool_calls: bool | None
    max_completion_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None
