"""A model's own sampling is what transformers' generate would do with its generation_config.json."""

import json

import pytest
from transformers import GenerationConfig

from azu.errors import BrokenCheckpoint
from azu.protocol.sampling import SamplingParams
from deployments.services import default_sampling


def defaults(**settings: object) -> SamplingParams:
    return default_sampling({"generation_config.json": json.dumps(settings).encode()})


def test_without_a_word_a_model_is_greedy() -> None:
    assert default_sampling({}) == SamplingParams(max_tokens=1)
    assert defaults(do_sample=False, temperature=0.6).temperature == 0.0


def test_what_samples_and_says_no_more_samples_as_generate_does() -> None:
    theirs = GenerationConfig._get_default_generation_params()
    sampling = defaults(do_sample=True)

    assert sampling.temperature == theirs["temperature"]
    assert sampling.top_k == theirs["top_k"]
    assert sampling.top_p == theirs["top_p"]
    assert sampling.repetition_penalty == theirs["repetition_penalty"]


def test_the_files_values_are_taken_and_what_azu_does_not_know_is_left() -> None:
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
