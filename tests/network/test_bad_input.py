"""Bad input gets an OpenAI-shaped error that names what is wrong, and changes nothing anywhere."""

import json

import httpx
import pytest

from tests.network.user import User

pytestmark = pytest.mark.cluster

CHAT = {"model": "azu/tiny-dense", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION = {"model": "azu/tiny-dense", "prompt": "Hello"}

# path, body, status, param
REFUSED = [
    ("/v1/chat/completions", CHAT | {"model": "unknown/model"}, 404, "model"),
    ("/v1/chat/completions", CHAT | {"model": "azu/unknown"}, 404, "model"),
    ("/v1/chat/completions", CHAT | {"model": "../../etc"}, 400, "model"),
    ("/v1/chat/completions", CHAT | {"model": "/etc"}, 400, "model"),
    ("/v1/chat/completions", CHAT | {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"messages": "Hello"}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"max_tokens": -1}, 400, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"max_tokens": 10**9}, 400, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"max_tokens": "7"}, 400, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"temperature": 9}, 400, "temperature"),
    ("/v1/chat/completions", CHAT | {"n": 0}, 400, "n"),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/v1/chat/completions", CHAT | {"beams": 4}, 400, "beams"),
    ("/v1/completions", COMPLETION | {"prompt": ""}, 400, "prompt"),
    ("/v1/completions", COMPLETION | {"prompt": "word " * 5000}, 400, "prompt"),
    ("/v1/completions", COMPLETION | {"prompt": 7}, 400, "prompt"),
    ("/v1/completions", {"prompt": "Hello"}, 400, "model"),
    ("/v1/completions", COMPLETION | {"logit_bias": {"x": 1}}, 400, "logit_bias"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED)
def test_a_request_that_cannot_be_served_names_its_parameter(
    user: User, path: str, body: dict[str, object], status: int, param: str
) -> None:
    before = user.balance()

    reply = user.http.post(path, json=body)

    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert user.balance() == before


@pytest.mark.parametrize("est_tokens", [-1, 0, 10**12, "5", 1.5, None])
def test_est_tokens_out_of_range_are_refused(user: User, est_tokens: object) -> None:
    before = user.balance()

    reply = user.submit("Hello", est_tokens=est_tokens)

    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] in ("est_tokens", "max_tokens")
    assert user.balance() == before


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer azu-sk-wrong", "Basic abc"])
def test_requests_without_a_valid_key_are_refused(user: User, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}

    reply = httpx.post(f"{user.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=30)

    assert reply.status_code == 401
    assert reply.json()["error"]["type"] == "authentication_error"


def test_a_key_does_not_speak_for_another_address(user: User, other_user: User) -> None:
    body = {"user_address": other_user.address, "model_id": "azu/tiny-dense", "prompt": "Hi", "est_tokens": 4}

    reply = user.http.post("/submit", json=body)

    assert reply.status_code == 403
    assert reply.json()["error"]["param"] == "user_address"


def test_another_users_job_is_not_shown(user: User, other_user: User) -> None:
    job_id = user.submit("Hello", est_tokens=2).json()["job_id"]

    assert other_user.http.get(f"/results/{job_id}").status_code == 403
    assert user.http.get("/results/job-000000000000000000000000").status_code == 404


def test_without_balance_a_prompt_is_refused_before_anything_happens(poor_user: User) -> None:
    reply = poor_user.http.post("/v1/chat/completions", json=CHAT)

    assert reply.status_code == 402
    assert reply.json()["error"]["code"] == "insufficient_balance"
    assert poor_user.http.get("/v1/jobs").json()["data"] == []


def test_a_body_over_one_mebibyte_is_refused(user: User) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "x" * 1024 * 1024}]}

    reply = user.http.post("/v1/chat/completions", json=body)

    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model": NaN}'])
def test_a_body_that_is_not_a_json_object_is_refused(user: User, content: bytes) -> None:
    reply = user.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})

    assert reply.status_code == 400, reply.text
    assert json.loads(reply.text)["error"]["type"] == "invalid_request_error"


def test_sharding_needs_the_admin_key(user: User) -> None:
    assert user.http.post("/models/shard", json={"model_id": "azu/tiny-dense"}).status_code == 401


def test_an_unknown_transaction_credits_nothing(user: User) -> None:
    before = user.balance()

    reply = user.http.post("/deposit", json={"tx_sig": "0x" + "ab" * 32, "user_address": user.address})

    assert reply.status_code == 404, reply.text
    assert user.balance() == before


def test_a_malformed_transaction_id_is_refused(user: User) -> None:
    reply = user.http.post("/deposit", json={"tx_sig": "not-a-hash", "user_address": user.address})

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "tx_sig"


def test_another_users_deposit_cannot_be_claimed(user: User, other_user: User) -> None:
    before = user.balance()

    reply = user.http.post("/deposit", json={"tx_sig": other_user.deposit_hash, "user_address": user.address})

    assert reply.status_code == 403, reply.text
    assert user.balance() == before
