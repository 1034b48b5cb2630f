"""Every lamport of a job is accounted for, and only what was delivered is charged."""

import time

import openai
import pytest

from tests.cluster.user import User

pytestmark = pytest.mark.cluster


def settled(user: User) -> tuple[int, int]:
    """Return the balance once no job holds a reservation."""
    deadline = time.monotonic() + 30
    while (balance := user.balance())[1]:
        assert time.monotonic() < deadline, balance
        time.sleep(0.05)
    return balance


@pytest.mark.parametrize("model", ["azu/tiny-dense", "azu/tiny-moe"])
def test_a_receipt_adds_up_to_the_balance(user: User, model: str) -> None:
    before, _ = settled(user)
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)

    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "What is the capital of France?"}]
    )

    receipt = user.http.get(f"/v1/receipts/{answer.azu['job_id']}").json()
    charged = receipt["charged_lamports"]
    assert answer.usage is not None
    assert charged == 2 * answer.usage.total_tokens * receipt["num_layers"] == 2 * receipt["token_layers"]
    assert receipt["platform_lamports"] + sum(receipt["worker_lamports"].values()) == charged
    assert len(receipt["worker_lamports"]) >= 2, "at least two owners ran a piece"
    assert settled(user) == (before - charged, 0)
    layers = sorted(
        layer for piece in receipt["topology"] for layer in range(piece["layers"][0], piece["layers"][1])
    )
    assert layers == list(range(receipt["num_layers"]))


def test_the_experts_of_one_layer_are_on_at_least_two_nodes(user: User) -> None:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    answer = client.chat.completions.create(
        model="azu/tiny-moe", messages=[{"role": "user", "content": "What is the capital of France?"}]
    )

    topology = user.http.get(f"/v1/receipts/{answer.azu['job_id']}").json()["topology"]

    holders: dict[str, set[str]] = {}
    for piece in topology:
        for layer in piece["experts"]:
            holders.setdefault(layer, set()).add(piece["node"])
    assert any(len(nodes) >= 2 for nodes in holders.values()), topology


def test_a_stream_that_is_dropped_pays_for_what_was_delivered(user: User) -> None:
    before, _ = settled(user)
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    stream = client.chat.completions.create(
        model="azu/tiny-dense",
        messages=[{"role": "user", "content": "Tell me how azu works."}],
        stream=True,
        max_tokens=300,
        extra_body={"ignore_eos": True},
    )
    for _, chunk in zip(range(4), stream, strict=False):
        job_id = chunk.azu["job_id"]
    stream.close()

    after, reserved = settled(user)

    receipt = user.http.get(f"/v1/receipts/{job_id}").json()
    assert reserved == 0
    assert 0 < receipt["completion_tokens"] < 300
    assert before - after == receipt["charged_lamports"]
    assert user.http.get("/v1/jobs").json()["data"][0]["status"] == "cancelled"
