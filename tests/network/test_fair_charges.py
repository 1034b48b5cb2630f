"""What a client pays who leaves early, asks for many choices or comes again, over a whole network."""

import json
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from azu.config import load_network
from azu.launch.local_network import DEMO
from tests.network.actors import actors_named, ask_inside
from tests.network.recovering import Running, network_of
from tests.network.test_money import settled
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL = "azu/tiny-dense"
PREFIX = "pipeline:azu-tiny-dense"
CHUNK_TOKENS = 8
NUM_POINTS = 10
PRICE = 2 * 6  # of a token in six layers
# Some 200 tokens: far more than the points.
PROMPT = "Tell me how azu works, and what each layer of the model is for. " * 12


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """The demo's network with small steps of a prefill, and without limits on requests."""
    demo = load_network(DEMO)
    limits = demo.policy.limits.model_copy(
        update={"requests_per_minute": 60_000, "request_burst": 10_000, "repeat_within_s": 600}
    )
    engine = demo.policy.engine.model_copy(update={"prefill_chunk_tokens": CHUNK_TOKENS})
    policy = demo.policy.model_copy(update={"limits": limits, "engine": engine})
    with network_of(home, demo.model_copy(update={"policy": policy})) as started:
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
        started[1].http.post("/v1/completions", json=body).raise_for_status()
        yield started


def stop_at(tokens: int) -> Callable[[Any], None]:
    """Return what has a pipeline stand still once so many tokens of a prompt are sent; 0 lets it go."""

    def change(pipeline: Any) -> None:
        engine = pipeline._engine
        go_on = type(engine).next_batch

        def next_batch() -> object:
            users = [one for one in engine._sequences.values() if not one.is_background]
            is_there = any(one.num_scheduled >= tokens for one in users)
            return None if tokens and is_there else go_on(engine)

        engine.next_batch = next_batch
        pipeline._has_change.set()

    return change


def num_ran(pipeline: Any) -> list[int]:
    """Return, inside a Pipeline, how many tokens of each user's sequence have run."""
    return [one.num_ran for one in pipeline._engine._sequences.values() if not one.is_background]


def wait_for(found: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 30
    while not found():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def last_job(user: User) -> dict[str, Any]:
    job: dict[str, Any] = user.http.get("/v1/jobs").raise_for_status().json()["data"][0]
    return job


def asking(user: User, body: dict[str, Any]) -> HTTPConnection:
    """Ask for a stream over a connection of its own, which is read by nothing."""
    connection = HTTPConnection(urlsplit(user.url).netloc, timeout=60)
    headers = {"authorization": f"Bearer {user.api_key}", "content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), headers)
    return connection


def leave_at(user: User, tokens: int, body: dict[str, Any]) -> str:
    """Ask for a stream, leave when exactly so many tokens of the prompt have run, and return the job."""
    (pipeline,) = actors_named(PREFIX)
    before = last_job(user)["job_id"]
    ask_inside(pipeline, stop_at(tokens))
    connection = asking(user, body)
    wait_for(lambda: ask_inside(pipeline, num_ran) == [tokens], f"{tokens} tokens never ran alone")
    connection.close()
    wait_for(
        lambda: "hung up" in (last_job(user)["phase"] or {}).get("text", ""),
        "the client's leaving was not seen",
    )
    ask_inside(pipeline, stop_at(0))
    job_id: str = last_job(user)["job_id"]
    assert job_id != before
    return job_id


def test_leaving_in_a_prefill_costs_the_prompt_tokens_that_ran(running: Running) -> None:
    _, user = running
    for point in range(1, NUM_POINTS + 1):
        tokens, (before, _) = point * CHUNK_TOKENS, settled(user)
        job_id = leave_at(user, tokens, {"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "seed": point})
        user.http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()

        after, _ = settled(user)

        receipt = user.http.get(f"/v1/receipts/{job_id}").json()
        assert (receipt["prompt_tokens"], receipt["completion_tokens"]) == (tokens, 0)
        assert before - after == receipt["charged_lamports"] == tokens * PRICE
        shared = receipt["platform_lamports"] + sum(receipt["worker_lamports"].values())
        assert shared == receipt["charged_lamports"]
        print(f"left after {tokens} prompt tokens: charged {receipt['charged_lamports']} lamports")


def test_eight_choices_are_charged_one_prompt(running: Running) -> None:
    _, user = running
    before, _ = settled(user)
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "n": 8, "temperature": 1.0, "ignore_eos": True}

    answer = user.http.post("/v1/completions", json=body).raise_for_status().json()

    usage = answer["usage"]
    assert (len(answer["choices"]), usage["completion_tokens"]) == (8, 32)
    assert before - settled(user)[0] == (usage["prompt_tokens"] + 32) * PRICE


def test_the_same_request_after_a_hang_up_goes_on_with_its_job(running: Running) -> None:
    _, user = running
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "ignore_eos": True, "seed": 99}
    whole = user.http.post("/v1/completions", json=body).raise_for_status().json()
    before, _ = settled(user)
    num_jobs = len(user.http.get("/v1/jobs", params={"limit": 1000}).json()["data"])
    job_id = leave_at(user, 3 * CHUNK_TOKENS, body)

    text = user.http.post("/v1/completions", json=body | {"stream": True}).raise_for_status().text

    assert job_id in text
    assert len(user.http.get("/v1/jobs", params={"limit": 1000}).json()["data"]) == num_jobs + 1
    receipt = user.http.get(f"/v1/receipts/{job_id}").json()
    assert receipt["charged_lamports"] == before - settled(user)[0] == whole["usage"]["cost_lamports"]
