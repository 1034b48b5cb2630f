"""The app as a whole: what it serves without a key, and one shape for every error."""

import asyncio
import json
from pathlib import Path

import pytest

from azu.errors import Unavailable
from azu.jobs.departures import Departures
from azu.redis_client import connect_redis
from deployments.ingress import contract
from tests.deployments.local import local_ingress


def test_the_contract_and_its_page_are_served_like_any_answer(redis_url: str, tmp_path: Path) -> None:
    async def ask() -> None:
        async with local_ingress(redis_url, tmp_path) as ingress, ingress.client() as client:
            document, docs, missing = [
                await client.get(path) for path in ("/openapi.json", "/docs", "/nowhere")
            ]
            wrong = await client.put("/health")
            assert document.json() == contract()
            assert docs.headers["content-type"].startswith("text/html")
            assert (missing.status_code, wrong.status_code) == (404, 405)
            assert missing.json()["error"]["code"] == "not_found"
            assert wrong.json()["error"]["type"] == "invalid_request_error"
            assert all(reply.headers["x-request-id"] for reply in (document, docs, missing, wrong))

    asyncio.run(asyncio.wait_for(ask(), 300))


REFUSED = [
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "Input should be a valid string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "messages.0.content.0.text",
        "Input should be a valid string",
    ),
    ({"messages": [{"role": "user"}]}, "messages.0", "a message needs content"),
    ({"messages": [7]}, "messages.0", "Input should be a valid dictionary"),
    ({"stop": ["\ud800"]}, "stop.0", "is not valid Unicode"),
    ({"messages": []}, "messages", "List should have at least 1 item, not 0"),
]


def test_a_refusal_speaks_of_the_request_and_not_of_the_program(redis_url: str, tmp_path: Path) -> None:
    async def ask() -> None:
        async with local_ingress(redis_url, tmp_path) as ingress:
            _, api_key = await ingress.user()
            async with ingress.client(api_key) as client:
                for change, param, fault in REFUSED:
                    body = {
                        "model": "azu/tiny-dense",
                        "messages": [{"role": "user", "content": "x"}],
                    } | change
                    content = json.dumps(body)
                    headers = {"content-type": "application/json"}
                    reply = await client.post("/v1/chat/completions", content=content, headers=headers)
                    error = reply.json()["error"]
                    assert (error["param"], error["message"]) == (param, f"{param}: {fault}")

    asyncio.run(asyncio.wait_for(ask(), 300))


def test_an_ingress_says_that_it_lives_also_after_an_unexpected_error(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat, left = Departures.beat, [KeyError("unexpected"), Unavailable("Redis is away")]

    async def beat_later(departures: Departures) -> None:
        if left:
            raise left.pop()
        await beat(departures)

    monkeypatch.setattr(Departures, "beat", beat_later)
    monkeypatch.setattr("deployments.ingress.BEAT_S", 0.01)

    async def scenario() -> None:
        redis = connect_redis(redis_url)
        async with local_ingress(redis_url, tmp_path) as ingress, asyncio.timeout(30):
            departures = ingress.app.state.services.intake.departures
            while not await redis.exists(f"azu:jobs:ingress:{departures.ingress}"):
                await asyncio.sleep(0.01)
        await redis.aclose()

    asyncio.run(scenario())
