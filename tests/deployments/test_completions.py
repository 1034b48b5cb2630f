"""The reader of an answer hears of it all the time, and an error has a status where it still can have one."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Message

from azu.errors import ShardError
from azu.jobs.redis import RedisJobs
from azu.metrics import SEQUENCES, TIME_PER_TOKEN, Meter, MetricsSnapshot
from azu.money.bookkeeping import Bookkeeper
from deployments import completions
from deployments.completions import EventStream
from tests.deployments.local import LocalIngress, NoNodes, Scenario, local_ingress, play_as_user, policy_with

MODEL = "azu/tiny-dense"
ASKED: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "Where is Paris?"}], "max_tokens": 5
}  # fmt: skip


@pytest.fixture
def play(redis_url: str, tmp_path: Path) -> Callable[[Scenario], None]:
    return partial(play_as_user, redis_url, tmp_path)


class Clock:
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    async def sleep(self, _: float) -> None:
        self._waiting.append(asyncio.get_running_loop().create_future())
        await self._waiting[-1]

    async def pass_once(self) -> None:
        """End every sleep and let what waited for it run."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()
        await settled()


async def settled() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_comment_fills_each_silence_of_a_stream_and_none_follows_its_end() -> None:
    async def scenario() -> None:
        clock, events, sent = Clock(), asyncio.Queue[str | None](), list[bytes]()

        async def written() -> AsyncIterator[str]:
            while (event := await events.get()) is not None:
                yield event

        async def send(message: Message) -> None:
            sent.append(message.get("body", b"status"))

        async def say(event: str | None) -> None:
            events.put_nowait(event)
            await settled()

        async def sign() -> str:
            return signs[0]

        signs = ["one"]
        stream = EventStream(written(), sign, clock.sleep)
        streaming = asyncio.create_task(stream.stream_response(send))
        await settled()
        await say("a")
        await clock.pass_once()
        assert sent == [b"status", b"a"]
        for _ in range(4):
            await clock.pass_once()
        assert sent[2:] == [b"one", b"one"], "the same comes at every other look"
        signs[:] = ["two"]
        await clock.pass_once()
        await say("b")
        await clock.pass_once()
        await clock.pass_once()
        await clock.pass_once()
        await say(None)
        await streaming
        await clock.pass_once()
        assert sent[4:] == [b"two", b"b", b"two", b""]

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_stream_is_alive_before_its_first_token_and_clients_see_only_the_answer(
    play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "_HELD_BACK_S", 0.02)
    monkeypatch.setattr(completions, "_LOOK_S", 0.02)

    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient) -> None:
        ingress.model.delay_s = 0.3
        asked = ASKED | {"stream": True}
        raw = (await http.post("/v1/chat/completions", json=asked)).content
        job_id = json.loads(raw.split(b"data: ")[1].split(b"\n")[0])["azu"]["job_id"]
        again = (await http.get(f"/v1/jobs/{job_id}/stream", params={"chat": True})).text
        text = (await http.post("/v1/chat/completions", json=ASKED)).json()["choices"][0]["message"][
            "content"
        ]
        client = openai.AsyncOpenAI(base_url="http://azu.test/v1", api_key="k", http_client=http)
        client.api_key = http.headers["authorization"].removeprefix("Bearer ")
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked)]

        comments = [line for line in raw.splitlines() if line.startswith(b": phase ")]
        assert raw.startswith(b": phase "), "it comes before all else"
        # On a busy machine there is time for one between the tokens too.
        names = {"queued", "loading", "reading", "answering"}
        assert {json.loads(line[8:])["name"] for line in comments} <= names
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text != ""
        assert again.endswith("data: [DONE]\n\n")

    play(scenario)


@pytest.mark.parametrize("tokens", [(), (2,)])
def test_a_job_that_fails_before_its_first_text_has_a_status_of_its_own(
    play, tokens: tuple[int, ...]
) -> None:
    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient) -> None:
        ingress.model.error, ingress.model.token_ids = ShardError("a shard is damaged"), tokens
        ingress.model.silent = not tokens
        for stream in (True, False):
            reply = await http.post("/v1/chat/completions", json=ASKED | {"stream": stream})
            assert reply.status_code == 500
            assert reply.json()["error"]["code"] == "bad_shard"
            # The special token was computed and is charged.
            assert reply.headers.get("x-should-retry") == ("false" if tokens else None)

    play(scenario)


def test_a_job_that_fails_later_is_an_error_in_its_stream(play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_HELD_BACK_S", 0.02)

    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient) -> None:
        ingress.model.error, ingress.model.silent = ShardError("a shard is damaged"), True
        ingress.model.delay_s = 0.3
        reply = await http.post("/v1/chat/completions", json=ASKED | {"stream": True})
        assert reply.status_code == 200
        *_, error, end = reply.text.split("data: ")
        assert json.loads(error)["error"]["code"] == "bad_shard"
        assert end == "[DONE]\n\n"

    play(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_an_unexpected_error_of_an_accepted_job_is_not_asked_for_again(
    play, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def broken(*_: Any, **__: Any) -> AsyncIterator[Any]:
        raise ZeroDivisionError("in a decoder")
        yield

    monkeypatch.setattr(completions, "follow", broken)

    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/chat/completions", json=ASKED | {"stream": stream})
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert "decoder" not in reply.text
        assert reply.headers["x-should-retry"] == "false"

    play(scenario)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_completions_prompt_has_special_tokens_where_the_policy_says_so(
    redis_url: str, tmp_path: Path, allowed: bool
) -> None:
    async def ask() -> None:
        policy = policy_with(special_tokens_in_prompts=allowed)
        async with local_ingress(redis_url, tmp_path, policy) as ingress:
            address, api_key = await ingress.user()
            async with ingress.client(api_key) as http:
                body = {"model": MODEL, "prompt": "<|user|>", "max_tokens": 1}
                completed = (await http.post("/v1/completions", json=body)).json()
                quote = {"model": MODEL, "prompt": "<|user|>"}
                quoted = (await http.post("/v1/quote", json=quote)).json()
                submit = {"model_id": MODEL, "prompt": "<|user|>", "est_tokens": 1, "user_address": address}
                job_id = (await http.post("/submit", json=submit)).json()["job_id"]
                submitted = (await http.get(f"/results/{job_id}")).json()
        counts = (completed["usage"]["prompt_tokens"], submitted["usage"]["prompt_tokens"])
        assert {*counts, quoted["prompt_tokens"]} == ({1} if allowed else {counts[0]})
        assert allowed or counts[0] > 1

    asyncio.run(asyncio.wait_for(ask(), 120))


class Slow(NoNodes):
    """A scheduler whose model takes a second for each token."""

    async def metrics(self) -> MetricsSnapshot:
        meter = Meter()
        meter.observe(TIME_PER_TOKEN, 1.0, MODEL)
        meter.set_gauge(SEQUENCES, {(MODEL, "running"): 1})
        return meter.snapshot()


def test_a_whole_answer_that_would_take_too_long_is_refused_before_anything_is_reserved(play) -> None:
    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient) -> None:
        ingress.app.state.services._actors["scheduler"] = Slow()
        long = ASKED | {"max_tokens": 61}
        refused = await http.post("/v1/chat/completions", json=long)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "61")
        assert refused.json()["error"]["code"] == "answer_takes_too_long"
        assert (await http.get("/v1/jobs")).json()["data"] == []
        wrong = await http.post("/v1/chat/completions", json=ASKED | {"max_tokens": 10**6})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")
        for asked in (ASKED, long | {"stream": True}):
            assert (await http.post("/v1/chat/completions", json=asked)).status_code == 200

    play(scenario)


FAILING = {
    "the reservation": (Bookkeeper, "reserve"),
    "the writing of the job": (RedisJobs, "submit"),
}


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", FAILING)
def test_a_job_that_an_unexpected_exception_kept_from_its_client_holds_no_money_and_no_place(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, is_done: bool
) -> None:
    owner, name = FAILING[step]
    usual = getattr(owner, name)

    async def failing(*arguments: Any, **named: Any) -> None:
        if is_done:
            await usual(*arguments, **named)
        raise ZeroDivisionError

    async def scenario() -> None:
        async with local_ingress(redis_url, tmp_path, policy_with(max_jobs_in_flight=1)) as ingress:
            address, api_key = await ingress.user()
            before = await ingress.money(address)
            async with ingress.client(api_key) as http, asyncio.timeout(60):
                with monkeypatch.context() as struck:
                    struck.setattr(owner, name, failing)
                    refused = await http.post("/v1/chat/completions", json=ASKED)
                assert refused.status_code == 500
                assert refused.json()["error"]["code"] == "internal_error"

                while (await ingress.money(address))[1]:
                    await asyncio.sleep(0.01)
                while (answered := await http.post("/v1/chat/completions", json=ASKED)).status_code == 429:
                    await asyncio.sleep(0.01)
                assert answered.status_code == 200
                cost = answered.json()["usage"]["cost_lamports"]
                # A job that was written may have run before it was ended.
                may_have_run = step == "the writing of the job" and is_done
                assert before[0] - (await ingress.money(address))[0] in (cost, (1 + may_have_run) * cost)

    asyncio.run(scenario())
