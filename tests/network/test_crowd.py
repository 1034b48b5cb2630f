"""Requests of every kind at once: each gets the answer that it gets alone."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from tests.models.questions import questions
from tests.network.test_generation import chat_text, reference
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

NUM_GREEDY = 12
NUM_SAMPLED = 12
ARRIVE_WITHIN_S = 3.0
SEED = int(os.environ.get("AZU_TEST_SEED", "1"))


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that comes `after_s` seconds after the first may."""

    prompt: str
    sampling: dict[str, object]
    after_s: float


def crowd(model_id: str, seed: int) -> list[Asked]:
    """Return greedy requests, then sampled ones, with random lengths, parameters and arrivals."""
    chance = random.Random(seed)
    texts = [chat_text(model_id, pair.question) for pair in questions()]

    def asked(sampling: dict[str, object]) -> Asked:
        # A shortened text is a prompt too; several in a row are longer than one prefill chunk.
        prompt = "".join(chance.choices(texts, k=chance.choice((1, 1, 2, 8))))[chance.randrange(40) :]
        common = {"max_tokens": chance.randrange(3, 90), "ignore_eos": True}
        return Asked(prompt, common | sampling, chance.random() * ARRIVE_WITHIN_S)

    greedy = [
        asked({"temperature": 0, "repetition_penalty": chance.choice((1.0, 1.3))}) for _ in range(NUM_GREEDY)
    ]
    sampled = [
        asked(
            {
                "temperature": chance.uniform(0.3, 1.8),
                "top_p": chance.choice((1.0, 0.9)),
                "top_k": chance.choice((0, 40)),
                "min_p": chance.choice((0.0, 0.05)),
                "presence_penalty": chance.choice((0.0, 0.7)),
                "frequency_penalty": chance.choice((0.0, 0.4)),
                "seed": chance.randrange(2**31),
            }
        )
        for _ in range(NUM_SAMPLED)
    ]
    return greedy + sampled


def answered(user: User, model_id: str, asked: Asked) -> list[int]:
    body = {"model": model_id, "prompt": asked.prompt, **asked.sampling}
    reply = user.http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    token_ids = user.results(reply.json()["azu"]["job_id"])["token_ids"]
    assert isinstance(token_ids, list)
    assert len(token_ids) == asked.sampling["max_tokens"]
    return token_ids


def expected(model_id: str, asked: Asked) -> list[int]:
    """Return what transformers generates greedily."""
    tokenizer, model = reference(model_id)
    encoded = tokenizer(asked.prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(
            **encoded,
            do_sample=False,
            # -1 is the id of no token, so it ends no stream.
            eos_token_id=-1,
            max_new_tokens=asked.sampling["max_tokens"],
            repetition_penalty=asked.sampling["repetition_penalty"],
        )
    found: list[int] = ids[0, encoded["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.parametrize("model_id", ["azu/tiny-dense", "azu/tiny-moe"])
def test_each_of_24_requests_at_once_is_answered_as_if_it_were_alone(user: User, model_id: str) -> None:
    requests = crowd(model_id, SEED)
    assert len(requests) == 24

    def in_company(asked: Asked) -> list[int]:
        time.sleep(asked.after_s)
        return answered(user, model_id, asked)

    with ThreadPoolExecutor(len(requests)) as pool:
        company = list(pool.map(in_company, requests))

    for asked, found in list(zip(requests, company, strict=True))[:NUM_GREEDY]:
        assert found == expected(model_id, asked), asked
    for asked, found in list(zip(requests, company, strict=True))[NUM_GREEDY:]:
        assert found == answered(user, model_id, asked), asked
    tokens = sum(map(len, company))
    print(
        f"\n{model_id}: 24 requests at once, {tokens} tokens, 12 greedy equal transformers, 12 sampled alone"
    )
