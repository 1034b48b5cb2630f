"""The client over real HTTP: its requests, its values and its errors."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account

from azu.api.jobs import Phase
from azu.api.openai import ChatChunk, TextChunk
from azu.auth.key_records import ApiKey, key_id_of, key_record_is_signed, key_text, secret_digest
from azu.auth.signatures import is_dispute
from azu.client import Client
from azu.client import stream as client_stream
from azu.errors import (
    AzuError,
    DeadlineExceeded,
    FrameError,
    InsufficientBalance,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from tests.client.answers import MODEL, RECEIPT, USAGE, delta, last_chunk, piece
from tests.client.ingress import PLATFORM, Comment, Ingress, Reply, platform_of, running_ingress, signing_in

STRANGER = "0x" + "66" * 20


@pytest.fixture
def ingress() -> Iterator[Ingress]:
    with running_ingress() as running:
        yield running


@pytest.fixture
def client(ingress: Ingress) -> Iterator[Client]:
    client = Client(ingress.url, "azu-sk-key", timeout_s=10)
    yield client
    client.close()


def refusal(error: AzuError) -> Reply:
    return Reply(error.to_openai(), error.status)


def test_a_prompt_is_streamed_piece_by_piece(ingress: Ingress, client: Client) -> None:
    chunks = (piece("Pa"), piece("ris"), piece("", finish="stop"), last_chunk(), "[DONE]")
    ingress.replies["POST /v1/completions"] = Reply(chunks=chunks)

    stream = client.stream("The capital of France is", model=MODEL, max_tokens=7, temperature=0.5)

    assert stream.job_id == ""
    assert [text for text in stream if text] == ["Pa", "ris"]
    assert stream.job_id == "job-1"
    generation = stream.result()
    assert generation.text == "Paris"
    assert generation.finish_reason == "stop"
    assert generation.job_id == "job-1"
    assert (generation.receipt.charged_lamports, generation.receipt.topology[0].node) == (60, "ada")
    (request,) = ingress.requests
    assert request.authorization == "Bearer azu-sk-key"
    assert request.body == {
        "model": MODEL,
        "prompt": "The capital of France is",
        "max_tokens": 7,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_receipt": True},
    }


def test_a_stream_says_where_its_job_stands_and_reads_on_where_it_does_not_know_the_phase(
    ingress: Ingress, client: Client
) -> None:
    phase = {
        "name": "fetching",
        "text": "Fetching.",
        "done": 3,
        "total": 9,
        "bytes_done": 120,
        "bytes_total": 410,
    }
    signs = [json.dumps(one) for one in (phase, phase | {"name": "dreaming"})] + ["{"]
    comments = tuple(Comment(f"phase {sign}") for sign in signs)
    ingress.replies["POST /v1/completions"] = Reply(
        chunks=(*comments, Comment("keep-alive"), piece("Pa", finish="stop"), last_chunk(), "[DONE]")
    )
    stream, seen = client.stream("The capital", model=MODEL), list[Phase]()
    stream.on_phase = seen.append

    assert stream.result().text == "Pa"
    assert seen == [Phase(**phase)] == [stream.phase]


def test_a_phase_that_cannot_be_shown_ends_the_job(ingress: Ingress, client: Client) -> None:
    sizes = dict.fromkeys(("done", "total", "bytes_done", "bytes_total"))
    comment = Comment(f"phase {json.dumps({'name': 'loading', 'text': 'Loading.', **sizes})}")
    ingress.replies["POST /v1/completions"] = Reply(chunks=(comment,), headers={"x-job-id": "job-1"})
    stream = client.stream("The capital", model=MODEL)

    def broken(_: Phase) -> None:
        raise BrokenPipeError

    stream.on_phase = broken
    with pytest.raises(BrokenPipeError):
        stream.result()
    assert ingress.requests[-1].path == "/v1/jobs/job-1/cancel"


def test_generate_returns_the_whole_text(ingress: Ingress, client: Client) -> None:
    chunks = (piece("Pa"), piece("ris", finish="length"), last_chunk(), "[DONE]")
    ingress.replies["POST /v1/completions"] = Reply(chunks=chunks)

    generation = client.generate("The capital of France is", model=MODEL)

    assert (generation.text, generation.finish_reason) == ("Paris", "length")


def test_a_chat_goes_through_the_models_template(ingress: Ingress, client: Client) -> None:
    chunks = (
        delta(""),
        delta("東"),
        delta("京 🗼"),
        delta(None, finish="stop"),
        last_chunk(ChatChunk),
        "[DONE]",
    )
    ingress.replies["POST /v1/chat/completions"] = Reply(chunks=chunks)
    messages = [{"role": "user", "content": "日本の首都は?"}]

    generation = client.chat(messages, model=MODEL)

    assert generation.text == "東京 🗼"
    assert ingress.requests[0].body["messages"] == messages


def test_a_stream_is_split_where_its_lines_end_and_nowhere_else(ingress: Ingress, client: Client) -> None:
    text = "a\u0085b\u2028c\u2029d\x0be"
    ingress.replies["POST /v1/completions"] = Reply(
        chunks=(
            json.dumps(piece(text), ensure_ascii=False), piece("", finish="stop"), last_chunk(), "[DONE]",
        )
    )  # fmt: skip

    assert client.generate("x", model=MODEL).text == text


def test_a_broken_stream_that_cannot_continue_is_an_error(ingress: Ingress, client: Client) -> None:
    ingress.replies["POST /v1/completions"] = Reply(chunks=(piece("Pa"),))

    with pytest.raises(NotFound):
        client.generate("The capital of France is", model=MODEL)


def test_a_broken_stream_continues_behind_its_last_chunk(ingress: Ingress, client: Client) -> None:
    ingress.replies["POST /v1/completions"] = Reply(chunks=(piece("Pa", after=1),))
    again = "GET /v1/jobs/job-1/stream?chat=false&after="
    ingress.replies[f"{again}1"] = Reply(chunks=(piece("ri", after=3),))
    rest = (piece("s", after=4), piece("", finish="stop", after=4), last_chunk(), "[DONE]")
    ingress.replies[f"{again}3"] = Reply(chunks=rest)

    generation = client.generate("The capital of France is", model=MODEL)

    assert (generation.text, generation.finish_reason) == ("Paris", "stop")
    # The receipt speaks of two tokens; the places in the stream say that four came.
    assert generation.received_tokens == 4
    assert generation.difference == "2 tokens of the answer were charged, 4 came"


@pytest.mark.parametrize("chunks", [(), (piece("Pa", after=1),), (piece("Pa", after=1), last_chunk())])
@pytest.mark.parametrize("returns", [(), (0.0, 0.0)])
def test_a_stream_that_just_ends_is_an_error(
    ingress: Ingress,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    chunks: tuple[dict[str, Any], ...],
    returns: tuple[float, ...],
) -> None:
    monkeypatch.setattr(client_stream, "_RETURNS_S", returns)
    ingress.replies["POST /v1/completions"] = Reply(chunks=chunks)
    ingress.replies["GET /v1/jobs/job-1/stream?chat=false&after=1"] = Reply(chunks=())

    with pytest.raises(Unavailable, match="before its answer was complete"):
        client.generate("The capital of France is", model=MODEL)
    with pytest.raises(Unavailable, match="before its answer was complete"):
        list(client.stream("The capital of France is", model=MODEL))


def test_a_stream_without_the_receipt_of_its_answer_is_an_error(ingress: Ingress, client: Client) -> None:
    ingress.replies["POST /v1/completions"] = Reply(chunks=(piece("Paris", finish="stop"), "[DONE]"))

    with pytest.raises(Unavailable, match="without the receipt"):
        client.generate("The capital of France is", model=MODEL)


@pytest.mark.parametrize(
    "chunk", [{"choices": []}, [], "no JSON", {"choices": "x"} | piece("Pa") | {"azu": {}}]
)
def test_a_chunk_of_another_shape_is_an_error(ingress: Ingress, client: Client, chunk: Any) -> None:
    ingress.replies["POST /v1/completions"] = Reply(chunks=(chunk, "[DONE]"))

    with pytest.raises(InternalError):
        client.generate("The capital of France is", model=MODEL)


@pytest.mark.parametrize("chat", [False, True])
def test_the_texts_of_several_choices_are_kept_apart_by_their_index(
    ingress: Ingress, client: Client, chat: bool
) -> None:
    chunk = delta if chat else piece
    chunks = (
        chunk("Ro", index=1), chunk("Pa", index=0), chunk("me", index=1, finish="length"),
        chunk("ris", index=0, finish="stop"), last_chunk(ChatChunk if chat else TextChunk), "[DONE]",
    )  # fmt: skip
    ingress.replies[f"POST /v1/{'chat/' if chat else ''}completions"] = Reply(chunks=chunks)
    question = [{"role": "user", "content": "Name two cities."}]

    stream = client.chat_stream(question, model=MODEL, n=2) if chat else client.stream("x", model=MODEL, n=2)

    assert "".join(stream) == "Paris"
    generation = stream.result()
    assert [one.index for one in generation.choices] == [0, 1]
    assert ("Rome" in str(generation.choices[1]), generation.choices[1].finish_reason) == (True, "length")
    assert (generation.text, generation.finish_reason) == ("Paris", "stop")


def test_an_error_in_a_stream_is_raised_after_the_text_before_it(ingress: Ingress, client: Client) -> None:
    broken = FrameError("node ada sent a frame that is not finite").to_openai()
    ingress.replies["POST /v1/completions"] = Reply(chunks=(piece("Pa"), broken, "[DONE]"))
    stream = iter(client.stream("The capital of France is", model=MODEL))

    assert next(stream) == "Pa"
    with pytest.raises(FrameError, match="not finite"):
        next(stream)


def test_closing_a_stream_closes_the_connection(ingress: Ingress, client: Client) -> None:
    endless = tuple(piece("word " * 1000) for _ in range(5000))
    ingress.replies["POST /v1/completions"] = Reply(chunks=endless)
    stream = client.stream("Tell me how azu works.", model=MODEL)

    assert next(iter(stream)).startswith("word")
    stream.close()

    assert ingress.closed_early.wait(10)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("must be at least 1", param="max_tokens"),
        Unauthenticated("unknown key"),
        InsufficientBalance("you need 7 lamports more"),
        ModelNotFound("no such model", param="model"),
        RateLimited("slow down"),
        InternalError("this should not have happened"),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_an_error_has_the_class_that_the_network_raised(
    ingress: Ingress, client: Client, error: AzuError, streamed: bool
) -> None:
    ingress.replies["POST /v1/completions"] = refusal(error)
    ingress.replies["GET /v1/balance"] = refusal(error)

    with pytest.raises(type(error)) as raised:
        client.generate("Hello", model=MODEL) if streamed else client.balance()

    assert type(raised.value) is type(error)
    assert (raised.value.message, raised.value.param, raised.value.code) == (
        error.message, error.param, error.code,
    )  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"<html>Bad Gateway</html>", b"[]", b'{"error": "text"}'])
def test_an_answer_of_another_server_is_an_error(ingress: Ingress, client: Client, content: bytes) -> None:
    ingress.replies["GET /v1/balance"] = Reply(content=content, status=503)

    with pytest.raises(Unavailable, match=f"{ingress.url}/v1/balance answered 503 .*is it a network of azu"):
        client.balance()


def test_a_good_status_without_json_is_an_error(ingress: Ingress, client: Client) -> None:
    ingress.replies["GET /v1/balance"] = Reply(content=b"hello")

    with pytest.raises(InternalError):
        client.balance()


def test_a_network_that_cannot_be_reached_is_an_error() -> None:
    client = Client("http://127.0.0.1:9", timeout_s=2)

    assert not client.healthy()
    with pytest.raises(Unavailable, match=r"no network answers at http://127\.0\.0\.1:9: `azu up`"):
        client.balance()


def test_a_network_that_does_not_answer_times_out() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        with pytest.raises(DeadlineExceeded):
            client.balance()


def test_health_is_false_while_starting(ingress: Ingress, client: Client) -> None:
    ingress.replies["GET /health"] = Reply({"status": "starting"}, 503)
    assert not client.healthy()
    ingress.replies["GET /health"] = Reply({"status": "ok"})
    assert client.healthy()


def test_login_makes_the_key_and_sends_its_hash_alone(ingress: Ingress, client: Client) -> None:
    account = Account.create()
    signing_in(ingress)
    ingress.replies["GET /v1/balance"] = Reply(
        {"address": account.address.lower(), "available_lamports": 5, "reserved_lamports": 0}
    )

    api_key = client.login(account, label="laptop", expires_in_s=60, spend_limit_lamports=7)

    _, challenge, keys = ingress.requests
    assert api_key.removeprefix("azu-sk-") not in str(ingress.requests)
    assert challenge.body["key_sha256"] == secret_digest(api_key)
    assert (challenge.body["label"], challenge.body["spend_limit_lamports"]) == ("laptop", 7)
    assert keys.body["nonce"] == "0f"
    assert client.balance().available_lamports == 5
    assert ingress.requests[-1].authorization == f"Bearer {api_key}"


def test_the_signature_proves_the_whole_record(ingress: Ingress, client: Client) -> None:
    account = Account.create()
    signing_in(ingress)

    api_key = client.login(account, label="laptop", spend_limit_lamports=7)

    digest, here = secret_digest(api_key), ingress.url.removeprefix("http://")
    key = ApiKey(
        key_id_of(digest), digest, account.address.lower(), "laptop", 1_700_000_000_000, None, 7,
        signature=ingress.requests[-1].body["signature"],
    )  # fmt: skip
    assert key_record_is_signed(replace(key, text=key_text(key, PLATFORM, here, "0f")), PLATFORM)


def test_every_login_makes_another_key(ingress: Ingress, client: Client) -> None:
    account = Account.create()
    signing_in(ingress)

    assert len({client.login(account) for _ in range(5)}) == 5


def test_login_takes_a_private_key_and_never_sends_it(ingress: Ingress, client: Client) -> None:
    account = Account.create()
    signing_in(ingress)

    client.login(account.key.to_0x_hex())

    assert account.key.hex() not in str(ingress.requests)


def test_a_challenge_of_another_network_is_not_signed(ingress: Ingress, client: Client) -> None:
    signing_in(ingress, domain="azu.example:8000")

    with pytest.raises(InvalidRequest, match=r"azu\.example:8000"):
        client.login(Account.create())

    assert [request.path for request in ingress.requests] == ["/v1/platform", "/v1/auth/challenge"]


@pytest.mark.parametrize(
    "change",
    [
        lambda key: replace(key, digest="66" * 32, key_id=key_id_of("66" * 32)),
        lambda key: replace(key, spend_limit_lamports=None),
        lambda key: replace(key, spend_limit_lamports=8),
        lambda key: replace(key, expires_at_ms=None),
        lambda key: replace(key, expires_at_ms=key.expires_at_ms + 1000),
        lambda key: replace(key, label="another"),
        lambda key: replace(key, address=STRANGER.lower()),
    ],
)
def test_a_text_that_opens_another_key_is_not_signed(
    ingress: Ingress, client: Client, change: Callable[[ApiKey], ApiKey]
) -> None:
    signing_in(ingress, change=change)

    with pytest.raises(InvalidRequest, match="another text"):
        client.login(Account.create(), label="laptop", expires_in_s=60, spend_limit_lamports=7)

    assert len(ingress.requests) == 2


def test_a_text_for_another_platform_is_not_signed(ingress: Ingress, client: Client) -> None:
    signing_in(ingress, platform=STRANGER)

    with pytest.raises(InvalidRequest, match="another text"):
        client.login(Account.create())


def test_a_text_that_is_no_challenge_is_not_signed(ingress: Ingress, client: Client) -> None:
    platform_of(ingress)
    ingress.replies["POST /v1/auth/challenge"] = Reply(
        {"nonce": "n", "message": "I owe you 5 HYPE", "created_at_ms": 1}
    )

    with pytest.raises(InvalidRequest):
        client.login(Account.create())


def test_nothing_is_signed_for_another_platform_than_the_known_one(ingress: Ingress) -> None:
    signing_in(ingress)
    platform_of(ingress, STRANGER)
    client, account = Client(ingress.url, "azu-sk-key", platform=PLATFORM), Account.create()

    for act in (
        lambda: client.login(account),
        lambda: client.withdraw(account, 5),
        lambda: client.claim_earnings(account),
        lambda: client.dispute("job-1", account),
        client.platform,
    ):
        with pytest.raises(Unauthenticated, match=PLATFORM):
            act()
    assert {request.path for request in ingress.requests} == {"/v1/platform"}
    platform_of(ingress, PLATFORM.upper().replace("0X", "0x"))
    assert client.platform().address.lower() == PLATFORM


def test_a_dispute_is_signed_for_this_job_and_platform(ingress: Ingress, client: Client) -> None:
    account = Account.create()
    platform_of(ingress)
    ingress.replies["POST /v1/jobs/job-1/dispute"] = Reply({"job_id": "job-1", "held_lamports": 80})

    assert client.dispute("job-1", account).held_lamports == 80

    signature = ingress.requests[-1].body["signature"]
    assert is_dispute(account.address.lower(), "job-1", PLATFORM, signature)
    assert not is_dispute(account.address.lower(), "job-2", PLATFORM, signature)
    assert not is_dispute(account.address.lower(), "job-1", STRANGER, signature)


def test_an_error_does_not_quote_a_private_key(client: Client) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.login("0x" + "zz" * 32)

    assert "zz" not in refused.value.message


def test_fields_of_a_newer_network_are_ignored(ingress: Ingress, client: Client) -> None:
    ingress.replies["GET /v1/balance"] = Reply(
        {"address": "0x1", "available_lamports": 5, "reserved_lamports": 1, "invented_later": True}
    )

    assert client.balance().reserved_lamports == 1


def test_jobs_submit_results_and_receipts(ingress: Ingress, client: Client) -> None:
    ingress.replies["POST /submit"] = Reply({"job_id": "job-1"})
    ingress.replies["GET /v1/receipts/job-1"] = Reply(RECEIPT)
    ingress.replies["GET /results/job-1"] = Reply(
        {"job_id": "job-1", "status": "done", "text": "Paris", "token_ids": [1, 2], "choices": [],
         "usage": USAGE.model_dump(), "finish_reason": "stop", "error": None, "receipt": RECEIPT}
    )  # fmt: skip

    job_id = client.submit("The capital", model=MODEL, address="0xa", est_tokens=9)

    assert client.results(job_id).text == "Paris"
    piece_of_it = client.receipt(job_id).topology[0]
    assert piece_of_it.layers == (0, 6)
    assert piece_of_it.experts == {2: (0, 1)}
    assert ingress.requests[0].body == {
        "user_address": "0xa", "model_id": MODEL, "prompt": "The capital", "est_tokens": 9,
    }  # fmt: skip


def test_the_environment_sets_the_address_and_the_key(
    ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    import azu

    monkeypatch.setenv("AZU_URL", ingress.url)
    monkeypatch.setenv("AZU_API_KEY", "azu-sk-env")
    ingress.replies["POST /v1/completions"] = Reply(chunks=(piece("Paris"), last_chunk(), "[DONE]"))

    assert azu.generate("The capital of France is", model=MODEL, max_tokens=3).text == "Paris"
    assert "".join(azu.stream("The capital of France is", model=MODEL)) == "Paris"
    assert {request.authorization for request in ingress.requests} == {"Bearer azu-sk-env"}


def test_the_environments_key_is_told_to_no_other_network(
    ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZU_URL", "https://another.network")
    monkeypatch.setenv("AZU_API_KEY", "azu-sk-env")
    ingress.replies["POST /v1/completions"] = Reply(chunks=(piece("Paris"), last_chunk(), "[DONE]"))

    assert Client(ingress.url).generate("The capital of France is", model=MODEL).text == "Paris"
    assert "azu-sk-env" not in str([request.authorization for request in ingress.requests])


def test_a_job_is_deleted_by_its_id(ingress: Ingress, client: Client) -> None:
    ingress.replies["DELETE /v1/jobs/job-1"] = Reply({"deleted": "job-1"})
    refused = {"error": {"message": "it runs", "type": "t", "param": None, "code": "job_not_finished"}}
    ingress.replies["DELETE /v1/jobs/job-2"] = Reply(refused, status=409)

    assert client.delete_job("job-1") == "job-1"
    with pytest.raises(AzuError, match="it runs") as error:
        client.delete_job("job-2")

    assert error.value.code == "job_not_finished"
    assert {(one.method, one.authorization) for one in ingress.requests} == {("DELETE", "Bearer azu-sk-key")}
