"""How a job samples: the request's parameters, completed by the model's own defaults."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azu.api.openai import ChatRequest, CompletionRequest
from azu.config.network import Limits
from azu.errors import BrokenCheckpoint, InvalidRequest, plain_fault
from azu.protocol.sampling import SamplingParams

_FILE = "generation_config.json"
# How transformers' generate samples if the file sets no more than do_sample.
_TOP_K = 50
_TEMPERATURE = 1.0
# Parameters that a request may set; the others keep the model's default.
_PASSED = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens",
)  # fmt: skip


def sampling_params(
    body: ChatRequest | CompletionRequest,
    defaults: SamplingParams,
    vocab_size: int,
    *,
    default_max_tokens: int,
) -> SamplingParams:
    """Return the sampling that a request asks for; raises InvalidRequest with the parameter's name."""
    given = {name: value for name in _PASSED if (value := getattr(body, name)) is not None}
    bias = _logit_bias(body.logit_bias)
    check_tokens("logit_bias", bias, vocab_size)
    check_tokens("stop_token_ids", body.stop_token_ids or (), vocab_size)
    sampling = replace(
        defaults,
        **given,
        max_tokens=max_tokens(body, default_max_tokens),
        ignore_eos=body.ignore_eos,
        logit_bias=bias,
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=body.num_logprobs,
    )
    if (body.min_tokens or 0) > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {body.min_tokens}, more than max_tokens {sampling.max_tokens}",
            param="min_tokens",
        )
    return sampling


def max_tokens(body: ChatRequest | CompletionRequest, default: int) -> int:
    """Return how long the answer to a request may be, `default` where the request does not say."""
    newer = body.max_completion_tokens if isinstance(body, ChatRequest) else None
    asked = body.max_tokens if newer is None else newer
    # For a prompt that leaves no room, intake raises an error of its own.
    return max(1, default) if asked is None else asked


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float]:
    try:
        checked = {_token_id(token_id): value for token_id, value in (bias or {}).items()}
    except ValueError as error:
        raise InvalidRequest("its keys must be token ids", param="logit_bias") from error
    if not all(-100 <= value <= 100 for value in checked.values()):
        raise InvalidRequest("its values must lie between -100 and 100", param="logit_bias")
    return checked


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("not a number")
    return int(text)


def check_tokens(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raise InvalidRequest for ids that the model has no logit for; the last stage would fail on them."""
    if not all(0 <= token_id < vocab_size for token_id in token_ids):
        raise InvalidRequest(f"its token ids must lie between 0 and {vocab_size - 1}", param=param)


def check_limits(body: ChatRequest | CompletionRequest, limits: Limits) -> None:
    """Raise InvalidRequest with the name of the first parameter that exceeds its limit."""
    check_choices(body.n or 1, limits)
    check_max_tokens(max_tokens(body, 1), limits)
    if isinstance(body, CompletionRequest) and not isinstance(body.prompt, str):
        check_prompt_tokens(len(body.prompt), limits)
    counted = {
        "stop": (len(body.stop), limits.max_stop_strings),
        "stop_token_ids": (len(body.stop_token_ids or ()), limits.max_stop_strings),
        "logit_bias": (len(body.logit_bias or ()), limits.max_logit_bias),
    }
    if isinstance(body, ChatRequest):
        counted["messages"] = (len(body.messages), limits.max_messages)
        counted["tools"] = (len(body.tools or ()), limits.max_tools)
    for param, (asked, most) in counted.items():
        _check_most(param, asked, most)
    longest = max(map(len, body.stop), default=0)
    if longest > limits.max_stop_characters:
        raise InvalidRequest(
            f"stop: {longest} characters, where at most {limits.max_stop_characters} are taken here",
            param="stop",
        )


def check_max_tokens(asked: int, limits: Limits) -> None:
    """Raise InvalidRequest for more new tokens than an answer of any model may have here."""
    if asked > limits.max_completion_tokens:
        raise InvalidRequest(
            f"max_tokens is {asked}; it may be 1 to {limits.max_completion_tokens}", param="max_tokens"
        )


def check_prompt_tokens(num_tokens: int, limits: Limits) -> None:
    """Raise InvalidRequest for a longer prompt than any model takes here."""
    if num_tokens > limits.max_prompt_tokens:
        raise InvalidRequest(
            f"the prompt has {num_tokens} tokens; at most {limits.max_prompt_tokens} are taken here",
            param="prompt",
            code="context_length_exceeded",
        )


def check_choices(choices: int, limits: Limits) -> None:
    """Raise InvalidRequest for more answers to one prompt than the network gives."""
    _check_most("n", choices, limits.max_choices)


def _check_most(param: str, asked: int, most: int) -> None:
    if asked > most:
        raise InvalidRequest(f"{param}: {asked}, where at most {most} are taken here", param=param)


class _GenerationConfig(BaseModel):
    """The fields of generation_config.json that azu uses; the file may hold many others."""

    model_config = ConfigDict(extra="ignore")

    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    min_new_tokens: int | None = Field(default=None, ge=0)


def default_sampling(files: Mapping[str, bytes]) -> SamplingParams:
    """Return the sampling that a model's config files set; without do_sample it is greedy.

    Raises BrokenCheckpoint when generation_config.json is malformed.
    """
    try:
        found = _GenerationConfig.model_validate_json(files.get(_FILE, b"{}"))
    except ValidationError as error:
        place, fault = plain_fault(error.errors())
        raise BrokenCheckpoint(f"{_FILE}: {place or 'the file'}: {fault}") from error
    temperature = _TEMPERATURE if found.temperature is None else found.temperature
    top_k = _TOP_K if found.do_sample and found.top_k is None else found.top_k or 0
    return SamplingParams(
        max_tokens=1,
        temperature=temperature if found.do_sample else 0.0,
        top_k=top_k,
        top_p=1.0 if found.top_p is None else found.top_p,
        min_p=found.min_p or 0.0,
        repetition_penalty=1.0 if found.repetition_penalty is None else found.repetition_penalty,
        min_tokens=found.min_new_tokens or 0,
    )
