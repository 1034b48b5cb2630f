"""Odd requests between good ones: each ends with its reason, and no good one gets another answer for it."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.engine.families import build_lively
from tests.engine.overflowing import OVERFLOWS, make_overflow
from tests.network.models import save_tokenizer
from tests.network.recovering import pids, pieces_of
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

NUM_GOOD = 24
VOCAB_SIZE = 1024


@pytest.fixture(scope="module")
def model(model_root: Path) -> str:
    """A model in float32 that some tokens overflow, spread over the nodes."""
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = model_root / "overflowing"
    make_overflow(build_lively(config), torch.float32).save_pretrained(folder)
    return str(save_tokenizer(folder))


def good(number: int) -> dict[str, object]:
    sampled = {"temperature": 0.9, "top_p": 0.9, "seed": number}
    prompt = [20 + (7 * number + place) % 900 for place in range(1 + number)]
    bias = {str(token): -100 for token in OVERFLOWS}
    body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "logit_bias": bias}
    return body | (sampled if number % 2 else {})


def odd(number: int) -> tuple[dict[str, object], str | None]:
    """Return an odd request, and the code of the error that it gets."""
    prompt = [30 + number, 31, 32]
    token = list(OVERFLOWS)[number % len(OVERFLOWS)]
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True}
    kinds: tuple[tuple[dict[str, object], str | None], ...] = (
        ({"prompt": [*prompt, token, 40]}, "numerics_error"),
        ({"temperature": 1e-40, "repetition_penalty": 0.01}, None),
        ({"temperature": 2.0, "seed": number, "stop": ["\ufffd", "é"], "logprobs": 5}, None),
        ({"prompt": [token], "n": 2, "temperature": 1.0}, "numerics_error"),
        ({"temperature": 1.0, "top_p": 5e-324, "logit_bias": {str(n): -100 for n in range(300)}}, None),
    )
    changes, code = kinds[number % len(kinds)]
    return body | changes, code


def test_odd_requests_end_with_their_reasons_and_change_no_other_answer(user: User, model: str) -> None:
    def asked(body: Mapping[str, object]) -> tuple[int, dict[str, Any]]:
        reply = user.http.post("/v1/completions", json={"model": model, **body})
        return reply.status_code, reply.json()

    def texts(answers: list[tuple[int, dict[str, Any]]]) -> list[str]:
        assert {status for status, _ in answers} == {200}, answers
        return [answer["choices"][0]["text"] for _, answer in answers]

    expected = texts([asked(good(number)) for number in range(NUM_GOOD)])
    pieces = pids(pieces_of(model))
    before = sum(user.balance())
    odd_ones = [odd(number) for number in range(NUM_GOOD)]

    with ThreadPoolExecutor(2 * NUM_GOOD) as threads:
        mixed = [body for number in range(NUM_GOOD) for body in (good(number), odd_ones[number][0])]
        answers = list(threads.map(asked, mixed))

    assert texts(answers[::2]) == expected
    for (status, answer), (body, code) in zip(answers[1::2], odd_ones, strict=True):
        if code is None:
            assert status == 200, (body, answer)
        else:
            assert (status, answer["error"]["code"]) == (500, code), (body, answer)
            assert "not finite in float32" in answer["error"]["message"]
    assert pids(pieces_of(model)) == pieces, "no stage was replaced"
    available, reserved = user.balance()
    assert reserved == 0
    charged = sum(answer["usage"]["cost_lamports"] for status, answer in answers if status == 200)
    assert before - available == charged, "an error before the first token costs nothing"
    print(f"\n{NUM_GOOD} good requests between as many odd ones: the same answers, its {len(pieces)} pieces")
