"""The cluster returns the tokens that transformers returns, through every kind of client."""

import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.few import few
from tests.models.questions import built_in_folder, questions
from tests.network.user import User

pytestmark = pytest.mark.cluster

MODELS = ("azu/tiny-dense", "azu/tiny-moe")


@cache
def reference(model_id: str):
    folder = built_in_folder(model_id)
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


def expected_token_ids(model_id: str, text: str, max_new_tokens: int = 200) -> list[int]:
    tokenizer, model = reference(model_id)
    prompt = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens)
    return ids[0, prompt["input_ids"].shape[1] :].tolist()


def chat_text(model_id: str, question: str) -> str:
    """Return the prompt that the model's template makes of a question."""
    tokenizer, _ = reference(model_id)
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def finished(user: User, job_id: str) -> dict[str, object]:
    # Users of curl poll; the job's stream would end with its outcome.

    deadline = time.monotonic() + 120
    while (results := user.results(job_id))["status"] in ("queued", "running"):
        assert time.monotonic() < deadline, results
        time.sleep(0.1)
    return results


@pytest.mark.parametrize("model_id", few(reversed(MODELS)))
def test_greedy_tokens_equal_transformers_generate_for_every_question(user: User, model_id: str) -> None:
    texts = [chat_text(model_id, pair.question) for pair in questions()]
    assert len(texts) >= 20
    jobs = [user.submit(text, est_tokens=200, model=model_id).json()["job_id"] for text in texts]

    answers = [finished(user, job_id) for job_id in jobs]

    for text, answer in zip(texts, answers, strict=True):
        assert answer["status"] == "done", answer
        assert answer["token_ids"] == expected_token_ids(model_id, text), text


def test_the_openai_client_streams_a_chat(user: User) -> None:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)

    stream = client.chat.completions.create(
        model="azu/tiny-dense",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert len([chunk for chunk in chunks if chunk.choices]) > 3
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert chunks[-1].choices == []
    assert usage.cost_lamports == 2 * 6 * usage.total_tokens


def test_a_whole_answer_equals_its_streamed_pieces(user: User) -> None:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    prompt = chat_text("azu/tiny-moe", "What is the capital of France?")

    whole = client.completions.create(model="azu/tiny-moe", prompt=prompt, max_tokens=60)
    pieces = client.completions.create(model="azu/tiny-moe", prompt=prompt, max_tokens=60, stream=True)

    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(reference("azu/tiny-moe")[0](prompt)["input_ids"])


@pytest.mark.prove
def test_twelve_streams_run_at_once(user: User) -> None:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    asked = [pair.question for pair in questions()][:12]
    arrivals: list[tuple[int, str]] = []

    def stream(index: int) -> str:
        chunks = client.chat.completions.create(
            model="azu/tiny-dense",
            messages=[{"role": "user", "content": asked[index]}],
            stream=True,
            # Long enough that no stream ends before all are admitted, also on a busy machine.
            max_tokens=250,
            extra_body={"ignore_eos": True},
        )
        text = ""
        for chunk in chunks:
            piece = chunk.choices[0].delta.content or ""
            if not text and piece:
                arrivals.append((index, "first"))
            text += piece
        arrivals.append((index, "last"))
        return text

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(stream, range(12)))

    assert all(texts)
    # If only five ran at once, the first would end before the last begin.
    begun_before_any_end = [name for _, name in arrivals].index("last")
    assert begun_before_any_end >= 6, arrivals


def test_a_seeded_sample_is_the_same_alone_and_in_a_batch(user: User) -> None:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)

    def sample(seed: int) -> str:
        answer = client.chat.completions.create(
            model="azu/tiny-dense",
            messages=[{"role": "user", "content": "Tell me how azu works."}],
            temperature=1.5,
            seed=seed,
            max_tokens=40,
        )
        return answer.choices[0].message.content or ""

    alone = sample(7)
    with ThreadPoolExecutor(4) as pool:
        company = list(pool.map(sample, [7, 8, 9, 7]))

    assert company[0] == company[3] == alone
    assert len(set(company)) > 1


def test_curl_deposits_submits_and_reads_results(user: User) -> None:
    def curl(method: str, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
        command = [
            "curl",
            "-sS",
            "-X",
            method,
            f"{user.url}{path}",
            "-H",
            f"Authorization: Bearer {user.api_key}",
        ]
        if body is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)

    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    before = curl("GET", "/v1/balance")
    repeated = curl("POST", "/deposit", {"tx_sig": user.deposit_hash, "user_address": user.address})
    assert repeated["status"] == "credited"
    assert curl("GET", "/v1/balance") == before, "a deposit is credited once"

    text = chat_text("azu/tiny-dense", "What is the capital of France?")
    job = {"user_address": user.address, "model_id": "azu/tiny-dense", "prompt": text, "est_tokens": 50}
    job_id = str(curl("POST", "/submit", job)["job_id"])

    assert finished(user, job_id)["status"] == "done"
    assert "Paris" in str(curl("GET", f"/results/{job_id}")["text"])


def test_several_choices_pay_for_their_prompt_once(user: User) -> None:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    asked = {
        "model": "azu/tiny-dense",
        "messages": [{"role": "user", "content": "Tell me how azu works."}],
        "temperature": 1.5,
        "seed": 11,
        "max_tokens": 20,
    }

    alone = client.chat.completions.create(**asked)
    several = client.chat.completions.create(**asked, n=3)
    pieces = client.chat.completions.create(**asked, n=3, stream=True)

    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert texts[0] == alone.choices[0].message.content, "the first choice is what one alone would be"
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in pieces:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    counts = [len(choice["token_ids"]) for choice in user.results(several.azu["job_id"])["choices"]]
    assert several.usage.completion_tokens == sum(counts)
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens
    assert several.usage.cost_lamports == 2 * 6 * (several.usage.prompt_tokens + sum(counts))


@pytest.mark.parametrize("model_id", MODELS)
def test_log_probabilities_are_those_of_the_whole_model(user: User, model_id: str) -> None:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    text = chat_text(model_id, "What is the capital of France?")

    answer = client.completions.create(model=model_id, prompt=text, max_tokens=8, logprobs=3)

    tokenizer, model = reference(model_id)
    prompt = tokenizer(text)["input_ids"]
    generated = user.results(answer.azu["job_id"])["token_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *generated]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx(
        expected[range(len(generated)), generated].tolist(), abs=1e-3
    )
    for theirs, ours in zip(expected.topk(3).values.tolist(), logprobs.top_logprobs, strict=True):
        assert list(ours.values()) == pytest.approx(theirs, abs=1e-3)


def test_a_stop_token_and_a_minimum_length_are_respected(user: User) -> None:
    text = chat_text("azu/tiny-dense", "What is the capital of France?")
    whole = expected_token_ids("azu/tiny-dense", text)

    def token_ids(**asked: object) -> list[int]:
        body = {"model": "azu/tiny-dense", "prompt": text, "max_tokens": 60, **asked}
        reply = user.http.post("/v1/completions", json=body).raise_for_status().json()
        return user.results(reply["azu"]["job_id"])["token_ids"]

    assert token_ids(stop_token_ids=[whole[3]]) == whole[: whole.index(whole[3]) + 1]
    assert len(token_ids(min_tokens=40)) >= 40
    assert whole[0] not in token_ids(logit_bias={str(whole[0]): -100}, max_tokens=5)


def test_available_models_are_listed_with_their_prices(user: User) -> None:
    listed = {model["id"]: model for model in user.http.get("/v1/models").raise_for_status().json()["data"]}

    for model_id in MODELS:
        found = listed[model_id]
        assert (found["object"], found["owned_by"]) == ("model", "azu")
        assert found["context_length"] == 1024
        assert found["lamports_per_token"] == 2 * 6
        alone = user.http.get(f"/v1/models/{model_id}").json()
        assert alone.pop("tokens_per_s") is not None
        assert {name: found[name] for name in alone} == alone
    running = {one["model_id"] for one in user.http.get("/v1/network").json()["deployments"]}
    assert {model_id for model_id, model in listed.items() if model["deployed"]} == running
