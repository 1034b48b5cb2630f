"""A job's sampling: the model's own defaults, changed by the request; wrong values are refused by name."""

import json

import pytest
from transformers import GenerationConfig

from azu.api.openai import ChatRequest, CompletionRequest
from azu.config import load_network
from azu.errors import BrokenCheckpoint, InvalidRequest
from azu.protocol.sampling import SamplingParams
from deployments.sampling import check_limits, default_sampling, sampling_params

VOCAB_SIZE = 100
DEFAULTS = SamplingParams(max_tokens=1, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)


def asked(**given: object) -> SamplingParams:
    body = CompletionRequest.model_validate({"model": "m", "prompt": "x", "seed": 1, **given})
    return sampling_params(body, DEFAULTS, VOCAB_SIZE, default_max_tokens=50)


def test_a_parameter_that_a_request_leaves_out_has_the_models_default() -> None:
    sampling = asked(top_k=5)

    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 5, 0.8)
    assert sampling.repetition_penalty == 1.1
    assert sampling.max_tokens == 50


def test_every_parameter_reaches_the_engine() -> None:
    given = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 9, "min_tokens": 2, "ignore_eos": True,
        "max_tokens": 7,
    }  # fmt: skip

    sampling = asked(**given, logit_bias={"5": -100}, stop=["a", "b"], stop_token_ids=[7], logprobs=4)

    assert sampling == SamplingParams(
        **given, logit_bias={5: -100.0}, stop=("a", "b"), stop_token_ids=(7,), logprobs=4
    )  # type: ignore[arg-type]


def test_a_chat_may_use_the_newer_name_for_max_tokens() -> None:
    chat = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 3}
    )

    assert sampling_params(chat, DEFAULTS, VOCAB_SIZE, default_max_tokens=50).max_tokens == 3


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("logit_bias", {"100": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [-1]),
        ("min_tokens", 51),
    ],
)
def test_a_value_that_does_not_fit_the_model_is_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(**{param: value})

    assert refused.value.param == param


CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("n", {"n": 3}),
        ("stop", {"stop": ["x"] * 3}),
        ("stop", {"stop": "xxxx"}),
        ("stop_token_ids", {"stop_token_ids": [1, 2, 3]}),
        ("logit_bias", {"logit_bias": {"1": 1, "2": 1, "3": 1}}),
        ("messages", {"messages": CHAT["messages"] * 3}),
        ("tools", {"tools": [TOOL] * 3}),
    ],
)
def test_a_parameter_above_the_networks_limits_is_refused_by_name(
    param: str, given: dict[str, object]
) -> None:
    limits = load_network().policy.limits
    standard = ChatRequest.model_validate(CHAT | given)
    check_limits(standard, limits)
    two = {name: 2 for name in vars(limits) if name.startswith("max_")} | {"max_stop_characters": 3}

    with pytest.raises(InvalidRequest) as refused:
        check_limits(standard, limits.model_copy(update=two))

    assert refused.value.param == param


def defaults(**settings: object) -> SamplingParams:
    return default_sampling({"generation_config.json": json.dumps(settings).encode()})


def test_a_model_without_do_sample_is_greedy() -> None:
    assert default_sampling({}) == SamplingParams(max_tokens=1)
    assert defaults(do_sample=False, temperature=0.6).temperature == 0.0


def test_do_sample_alone_samples_with_the_defaults_of_generate() -> None:
    theirs = GenerationConfig._get_default_generation_params()
    sampling = defaults(do_sample=True)

    assert sampling.temperature == theirs["temperature"]
    assert sampling.top_k == theirs["top_k"]
    assert sampling.top_p == theirs["top_p"]
    assert sampling.repetition_penalty == theirs["repetition_penalty"]


def test_the_files_values_are_used_and_its_unknown_keys_ignored() -> None:
    sampling = defaults(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.05,
        min_new_tokens=3, eos_token_id=[1, 2], transformers_version="4.37.0", pad_token_id=None,
    )  # fmt: skip

    assert sampling == SamplingParams(
        max_tokens=1, temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.05, min_tokens=3
    )


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"temperature": "warm"}', b'{"top_p": 0}', b'{"top_k": -1}', b"\xff"]
)
def test_a_malformed_file_is_a_broken_checkpoint_that_names_it(content: bytes) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"generation_config\.json"):
        default_sampling({"generation_config.json": content})
