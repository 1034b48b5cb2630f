"""Every lamport of a job is in its receipt, and only delivered tokens are charged."""

import time

import httpx
import openai
import pytest
from eth_account import Account

from azu.auth.signatures import Withdrawal, sign_withdrawal, verify_receipt
from azu.client import Client
from azu.errors import Forbidden, InsufficientBalance, InvalidRequest, Unauthenticated
from azu.launch.local_network import LocalNetwork
from tests.network.user import User

pytestmark = pytest.mark.cluster

# Nearly all that the model's context has room for: on a busy machine the end of a connection is seen late.
MANY_TOKENS = 950


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


# A busy machine takes long to see the end of a connection: the answer may be whole by then.
@pytest.mark.prove
def test_a_dropped_stream_pays_for_the_delivered_tokens(user: User) -> None:
    before, _ = settled(user)
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    stream = client.chat.completions.create(
        model="azu/tiny-dense",
        messages=[{"role": "user", "content": "Tell me how azu works."}],
        stream=True,
        max_tokens=MANY_TOKENS,
        extra_body={"ignore_eos": True},
    )
    for _, chunk in zip(range(4), stream, strict=False):
        job_id = chunk.azu["job_id"]
    stream.close()

    after, reserved = settled(user)

    receipt = user.http.get(f"/v1/receipts/{job_id}").json()
    assert reserved == 0
    assert 0 < receipt["completion_tokens"] < MANY_TOKENS
    assert before - after == receipt["charged_lamports"]
    assert user.http.get("/v1/jobs").json()["data"][0]["status"] == "cancelled"


def test_a_quote_bounds_what_is_charged(user: User) -> None:
    prompt = "What is the capital of France?"
    asked = {"model": "azu/tiny-dense", "prompt": prompt, "max_tokens": 20}
    quote = user.http.post("/v1/quote", json=asked).raise_for_status().json()
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    usage = client.completions.create(**asked).usage

    assert usage is not None
    assert quote["prompt_tokens"] == usage.prompt_tokens
    assert quote["max_lamports"] == 2 * 6 * (usage.prompt_tokens + 20)
    assert usage.cost_lamports <= quote["max_lamports"]
    assert quote["expected_lamports"] <= quote["max_lamports"]
    assert quote["prediction"]["tokens_per_s"] > 0

    by_length = user.http.post(
        "/v1/quote", json={"model": "azu/tiny-dense", "tokens": usage.prompt_tokens, "max_tokens": 20}
    )
    assert by_length.json()["max_lamports"] == quote["max_lamports"]
    refused = user.http.post("/v1/quote", json={"model": "azu/tiny-dense", "max_tokens": 20})
    assert refused.json()["error"]["param"] == "prompt"


def test_a_receipt_is_signed_by_the_platform(network: LocalNetwork, user: User) -> None:
    client = openai.OpenAI(base_url=f"{user.url}/v1", api_key=user.api_key)
    job_id = client.completions.create(model="azu/tiny-dense", prompt="Hello", max_tokens=3).azu["job_id"]

    receipt = user.http.get(f"/v1/receipts/{job_id}").raise_for_status().json()

    assert verify_receipt(receipt) == network.platform_address
    with pytest.raises(InvalidRequest):
        verify_receipt(receipt | {"charged_lamports": 0})


def test_a_key_with_a_limit_spends_no_more_and_revokes_only_itself(user: User) -> None:
    limited = Client(user.url)
    limited.login(user.account, label="limited", spend_limit_lamports=2 * 6 * 40)
    mine, other = sorted(limited.api_keys(), key=lambda key: key.label != "limited")[:2]

    limited.generate("Hello", model="azu/tiny-dense", max_tokens=10)
    with pytest.raises(InsufficientBalance) as refused:
        limited.generate("Hello", model="azu/tiny-dense", max_tokens=40)
    assert refused.value.code == "spend_limit_reached"
    with pytest.raises(Forbidden):
        limited.revoke_key(other.key_id)

    settled(user)
    [shown] = [key for key in limited.api_keys() if key.key_id == mine.key_id]
    assert 0 < (shown.spent_lamports or 0) <= 2 * 6 * 40
    limited.revoke_key(mine.key_id)
    with pytest.raises(Unauthenticated):
        limited.balance()


def test_a_withdrawal_is_paid_on_the_chain_and_needs_the_wallets_signature(
    network: LocalNetwork, user: User
) -> None:
    client = Client(user.url, user.api_key)
    before, _ = settled(user)
    asked = client.withdraw(user.account, 5_000_000)

    deadline = time.monotonic() + 30
    while (state := client.withdrawal(asked.nonce)).state != "paid":
        assert state.state in ("waiting", "sending")
        assert time.monotonic() < deadline, state
        time.sleep(0.1)

    assert settled(user) == (before - 5_000_000, 0)
    rows = httpx.post(
        f"{network.chain_url}/info",
        json={"type": "userNonFundingLedgerUpdates", "user": user.address, "startTime": 0},
        timeout=10,
    ).json()
    sent = [row["delta"]["amount"] for row in rows if row["delta"].get("user") == network.platform_address]
    assert sent == ["0.05"]
    assert withdrawn_again(network, user, asked.nonce, 5_000_000).json()["state"] == "paid"
    assert withdrawn_again(network, user, asked.nonce, 6_000_000).status_code == 409
    with pytest.raises(InvalidRequest, match=r"at least 0\.01 HYPE"):
        client.withdraw(user.account, 999_999)
    with pytest.raises(InsufficientBalance):
        client.withdraw(user.account, before)
    with pytest.raises(Forbidden):
        client.withdraw(Account.create(), 5_000_000)


def withdrawn_again(network: LocalNetwork, user: User, nonce: int, lamports: int) -> httpx.Response:
    """Sign a withdrawal under a nonce that was used and hand it in."""
    asked = Withdrawal(
        address=user.address,
        lamports=lamports,
        nonce=nonce,
        expires_at_ms=time.time_ns() // 1_000_000 + 60_000,
    )
    body = {
        "lamports": lamports,
        "nonce": nonce,
        "expires_at_ms": asked.expires_at_ms,
        "signature": sign_withdrawal(user.account, asked, network.platform_address),
    }
    return user.http.post("/v1/withdrawals", json=body)
