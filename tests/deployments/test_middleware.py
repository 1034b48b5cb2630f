"""What every request gets: an id, limits, and an answer even if it fails."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from starlette.types import Message, Receive, Scope, Send

from azu.config import NetworkPolicy
from azu.jobs.redis import RedisJobs
from azu.money.treasury.request_reply import CreditState, DepositStatus
from deployments import middleware
from deployments.middleware import BodyLimit, ClientAddresses
from tests.deployments.local import LocalIngress, local_ingress, policy_with
from tests.logged import logged

Scenario = Callable[[LocalIngress], Awaitable[None]]
COMPLETION = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": 2}


@pytest.fixture
def play(redis_url: str, tmp_path: Path) -> Callable[..., None]:
    async def run(scenario: Scenario, policy: NetworkPolicy | None) -> None:
        async with local_ingress(redis_url, tmp_path, policy) as ingress:
            await asyncio.wait_for(scenario(ingress), 60)

    return lambda scenario, policy=None: asyncio.run(run(scenario, policy))


def test_a_request_keeps_the_id_that_its_caller_gave(play) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        async with ingress.client() as client:
            for given in ("mine-1", "a" * 128, "01890a5d-ac96-774b-bcce-b302099a8057"):
                for path in ("/v1/platform", "/v1/models", "/nowhere"):
                    reply = await client.get(path, headers={"x-request-id": given})
                    assert reply.headers.get_list("x-request-id") == [given]

    play(scenario)


def test_a_request_without_a_usable_id_gets_one(play) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        for given in (None, "", "a" * 129, "a b", "ä", "%0d%0a<script>", "a\x1b[2J", "a\x9b1m"):
            headers = {} if given is None else {"x-request-id": given.encode()}
            async with ingress.client() as client:
                replies = [await client.get("/v1/platform", headers=headers) for _ in range(2)]
            ids = [reply.headers["x-request-id"] for reply in replies]
            assert all(one.startswith("req-") for one in ids), given
            assert len(set(ids)) == 2, given

    play(scenario)


def test_a_failed_request_is_answered_and_logged_with_its_id(play, monkeypatch) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        _, api_key = await ingress.user()

        async def broken(*_: object) -> None:
            raise RuntimeError("the secret path /etc/x")

        monkeypatch.setattr("azu.auth.rate_limit.RedisRates.take", broken)
        async with ingress.client(api_key) as client:
            reply = await client.get("/v1/balance", headers={"x-request-id": "find-me"})
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "internal_error"
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"] == "find-me"

    with logged() as lines:
        play(scenario)
    (failed,) = (line for line in lines() if line["level"] == "ERROR")
    assert failed["request_id"] == "find-me"
    assert failed["message"] == "GET /v1/balance failed"


def test_a_key_with_too_many_requests_is_refused_with_a_time_to_wait(play) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        (_, one), (_, other) = await ingress.user(), await ingress.user()
        async with ingress.client(one) as client, ingress.client(other) as neighbour:
            replies = await asyncio.gather(*(client.get("/v1/balance") for _ in range(9)))
            refused = [reply for reply in replies if reply.status_code == 429]
            assert len(refused) == 4
            assert {reply.json()["error"]["type"] for reply in refused} == {"rate_limit_error"}
            assert all(1 <= int(reply.headers["retry-after"]) <= 60 for reply in refused)
            assert (await neighbour.get("/v1/balance")).status_code == 200

    play(scenario, policy_with(requests_per_minute=1, request_burst=5))


def test_the_keys_of_an_account_share_its_requests_and_show_what_they_may_spend_in_a_day(play) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        account = Account.create()
        keys = [await ingress.open_key(account), await ingress.open_key(account, spend_limit_lamports=5)]
        async with ingress.client(keys[0]) as client:
            listed = (await client.get("/v1/auth/keys")).json()["data"]
            assert [one["day_limit_lamports"] for one in listed] == [1_000_000_000, None]
            assert (await client.get("/v1/platform")).json()["key_day_lamports"] == 1_000_000_000
        async with ingress.client(keys[1]) as client:
            replies = [await client.get("/v1/balance") for _ in range(5)]
        assert [reply.status_code for reply in replies] == [200, 200, 200, 200, 429]

    play(scenario, policy_with(requests_per_minute=1, request_burst=5))


def test_an_account_has_few_transfers_a_minute_looked_for_but_asks_for_credited_ones_freely(
    play, monkeypatch
) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        services = ingress.app.state.services

        async def found(tx_hash: str, address: str, timeout_s: float) -> DepositStatus:
            state = CreditState.CREDITED if tx_hash == "good" else CreditState.PENDING
            return DepositStatus(state, address, 1)

        monkeypatch.setattr(services.books, "deposit", found)
        address, api_key = await ingress.user()

        async def ask(tx_hash: str) -> int:
            body = {"tx_sig": tx_hash, "user_address": address}
            async with ingress.client(api_key) as client:
                return (await client.post("/deposit", json=body)).status_code

        asked = ["good", *(f"0x{number}" for number in range(13))]
        assert [await ask(one) for one in asked] == [200] * 12 + [429] * 2
        assert await ask("good") == 200

    play(scenario)


def test_sign_ins_are_counted_by_their_senders_address(play) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        async with ingress.client() as client:
            body = {"address": Account.create().address, "key_sha256": "ab" * 32}
            replies = [await client.post("/v1/auth/challenge", json=body) for _ in range(5)]
        assert [reply.status_code for reply in replies] == [200, 200, 200, 429, 429]
        assert int(replies[-1].headers["retry-after"]) >= 1

    play(scenario, policy_with(sign_ins_per_minute=1, sign_in_burst=3))


def test_an_address_has_a_limited_number_of_keys(play) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        account = Account.create()
        first = await ingress.open_key(account)
        await ingress.open_key(account)
        with pytest.raises(Exception, match="403"):
            await ingress.open_key(account)
        async with ingress.client(first) as client:
            listed = (await client.get("/v1/auth/keys")).json()["data"]
            await client.delete(f"/v1/auth/keys/{listed[1]['key_id']}")
        assert len(listed) == 2
        await ingress.open_key(account)

    play(scenario, policy_with(max_keys=2))


def test_a_key_has_a_limited_number_of_jobs_in_flight_and_a_refused_job_changes_nothing(play) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        address, api_key = await ingress.user()
        ingress.model.delay_s = 30.0
        body = {"user_address": address, "model_id": "azu/tiny-dense", "prompt": "Hello", "est_tokens": 2}
        async with ingress.client(api_key) as client:
            taken = [await client.post("/submit", json=body) for _ in range(2)]
            before = await ingress.money(address)
            refused = await client.post("/v1/completions", json=COMPLETION)
        assert [reply.status_code for reply in taken] == [200, 200]
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_jobs"
        assert int(refused.headers["retry-after"]) >= 1
        assert await ingress.money(address) == before

    play(scenario, policy_with(max_jobs_in_flight=2))


def test_a_submit_whose_caller_hangs_up_leaves_no_reservation_without_its_job(play, monkeypatch) -> None:
    reserved, go_on = asyncio.Event(), asyncio.Event()
    submit = RedisJobs.submit

    async def held_up(*arguments: Any) -> None:
        reserved.set()
        await go_on.wait()
        await submit(*arguments)

    async def scenario(ingress: LocalIngress) -> None:
        monkeypatch.setattr(RedisJobs, "submit", held_up)
        address, api_key = await ingress.user()
        body = {"user_address": address, "model_id": "azu/tiny-dense", "prompt": "Hello", "est_tokens": 2}
        caller = Caller(key=f"Bearer {api_key}", path="/submit")
        caller.say(json.dumps(body).encode(), more=False)
        asking = asyncio.create_task(ingress.app(caller.scope, caller.body.get, caller.send))
        await reserved.wait()
        asking.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait({asking})
        async with ingress.client(api_key) as client:
            async with asyncio.timeout(15):
                while [one["status"] for one in (await client.get("/v1/jobs")).json()["data"]] != ["done"]:
                    await asyncio.sleep(0.2)
        assert (await ingress.books.bookkeeper.balance(address)).reserved_lamports == 0

    play(scenario)


def test_a_body_with_unprintable_keys_is_refused_with_a_printable_message(play) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        _, api_key = await ingress.user()
        async with ingress.client(api_key) as client:
            for name in ("\\ud800", "\\u0000", "x" * 100_000):
                content = f'{{"model": "azu/tiny-dense", "prompt": "x", "{name}": 1}}'
                reply = await client.post(
                    "/v1/completions", content=content, headers={"content-type": "application/json"}
                )
                assert reply.status_code == 400, reply.text
                assert len(reply.content) < 10_000

    play(scenario)


class Caller:
    """A request of which the test says what comes of its body, and its answer."""

    def __init__(self, *, key: str = "", path: str = "/v1/completions", method: str = "POST") -> None:
        headers = [(b"content-type", b"application/json")]
        headers += [(b"authorization", key.encode())] if key else []
        headers += [(b"transfer-encoding", b"chunked")]
        self.scope: Scope = {
            "type": "http", "method": method, "path": path, "headers": headers, "query_string": b"",
        }  # fmt: skip
        self.body: asyncio.Queue[Message] = asyncio.Queue()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.answer = b""

    def say(self, body: bytes, *, more: bool) -> None:
        self.body.put_nowait({"type": "http.request", "body": body, "more_body": more})

    async def send(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.headers |= dict(message.get("headers", ()))
        self.answer += message.get("body", b"")

    @property
    def code(self) -> str:
        return str(json.loads(self.answer)["error"]["code"])


async def echo(_: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def test_a_body_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_BODY_S", 0.05)

    async def scenario() -> None:
        for method in ("POST", "GET", "HEAD", "OPTIONS"):
            caller = Caller(method=method)
            caller.say(b"{", more=True)
            await BodyLimit(echo, 100)(caller.scope, caller.body.get, caller.send)
            assert (caller.status, caller.code) == (400, "slow_body")
            assert caller.headers[b"connection"] == b"close", "the rest of the body would hold it"

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_of_too_many_unfinished_bodies_the_oldest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_BODIES_AT_ONCE", 3)

    async def scenario() -> None:
        app = BodyLimit(echo, 100)
        callers = [Caller() for _ in range(9)]
        sending = []
        for caller in callers:
            caller.say(b"{", more=True)
            sending.append(asyncio.create_task(app(caller.scope, caller.body.get, caller.send)))
        await asyncio.gather(*sending[:6])
        assert {caller.code for caller in callers[:6]} == {"slow_body"}
        for caller in callers[6:]:
            caller.say(b"}", more=False)
        await asyncio.gather(*sending)
        assert [(caller.status, caller.answer) for caller in callers[6:]] == [(200, b"{}")] * 3

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_request_takes_a_place_when_its_body_is_read_and_its_key_is_good(play) -> None:
    async def scenario(ingress: LocalIngress) -> None:
        taken = ingress.app.state.services.answers._taken
        _, key = await ingress.user()
        good, bad = Caller(key=f"Bearer {key}"), Caller(key="Bearer azu-sk-unknown")
        held = set[int]()

        async def send(message: Message) -> None:
            held.add(taken.total())
            await good.send(message)

        answering = asyncio.create_task(ingress.app(good.scope, good.body.get, send))
        refusing = asyncio.create_task(ingress.app(bad.scope, bad.body.get, bad.send))
        for one in (good, bad):
            one.say(b'{"model": "azu/tiny-dense", "prompt": "Hello", ', more=True)
        await asyncio.sleep(0.05)
        assert not taken, "neither body is whole"
        bad.say(b'"max_tokens": 1}', more=False)
        await refusing
        assert (bad.status, taken.total()) == (401, 0)
        good.say(b'"max_tokens": 1}', more=False)
        await answering
        assert (good.status, held, taken.total()) == (200, {1}, 0)

    play(scenario)


def test_what_servers_proxy_believed_of_a_client_on_the_loopback_does_not_count() -> None:
    async def scenario() -> None:
        found = []

        async def note(scope: Scope, *_: object) -> None:
            found.append(scope["client"])

        app = ClientAddresses(note, trusted=(), behind=False)
        for client in (("9.9.9.9", 44), ("6.6.6.6", 0)):
            caller = Caller()
            caller.scope["client"] = client
            await app(caller.scope, caller.body.get, caller.send)
        # uvicorn gives the address of a forwarding header the port 0.
        assert found == [("9.9.9.9", 44), ("127.0.0.1", 0)]

    asyncio.run(scenario())
