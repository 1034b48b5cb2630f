"""A request's sampling: the model's defaults, changed by what the request says, refused by name."""

from pathlib import Path

import pytest

from azu.api.openai import ChatRequest, CompletionRequest
from azu.engine.tokenizer import Tokenizer
from azu.errors import InvalidRequest
from azu.jobs.intake import ModelFacts
from azu.protocol.sampling import SamplingParams
from deployments.sampling import sampling_params
from deployments.services import ServedModel

FOLDER = Path(__file__).parents[2] / "configs" / "models" / "tiny-dense"
DEFAULTS = SamplingParams(max_tokens=1, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def model() -> ServedModel:
    facts = ModelFacts(model_id="m", revision="r1", num_layers=6, context_length=64)
    return ServedModel(facts, vocab_size=100, tokenizer=Tokenizer(FOLDER), defaults=DEFAULTS)


def asked(model: ServedModel, **given: object) -> SamplingParams:
    body = CompletionRequest.model_validate({"model": "m", "prompt": "x", "seed": 1, **given})
    return sampling_params(body, model, default_max_tokens=50)


def test_what_a_request_leaves_out_is_the_models_own(model: ServedModel) -> None:
    sampling = asked(model, top_k=5)

    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 5, 0.8)
    assert sampling.repetition_penalty == 1.1
    assert sampling.max_tokens == 50


def test_every_parameter_reaches_the_engine(model: ServedModel) -> None:
    given = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 9, "min_tokens": 2, "ignore_eos": True,
        "max_tokens": 7,
    }  # fmt: skip

    sampling = asked(model, **given, logit_bias={"5": -100}, stop=["a", "b"], stop_token_ids=[7], logprobs=4)

    assert sampling == SamplingParams(
        **given, logit_bias={5: -100.0}, stop=("a", "b"), stop_token_ids=(7,), logprobs=4
    )  # type: ignore[arg-type]


def test_a_chat_may_call_its_limit_by_the_newer_name(model: ServedModel) -> None:
    chat = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 3}
    )

    assert sampling_params(chat, model, default_max_tokens=50).max_tokens == 3


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
def test_what_the_model_cannot_do_is_refused_by_name(model: ServedModel, param: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(model, **{param: value})

    assert refused.value.param == param
