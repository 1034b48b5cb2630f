"""A network that is about to stop takes no new jobs, and those that run end."""

import asyncio
from pathlib import Path

import pytest

from azu.jobs import draining
from azu.jobs.draining import Draining
from azu.redis_client import connect_redis
from tests.deployments.stepped import CHUNK_TOKENS, SteppedModel
from tests.deployments.test_leaving import ASKED, NUM_PROMPT, Client, play_with_client

STEPS = NUM_PROMPT // CHUNK_TOKENS + 4  # of its five tokens the first comes with the prompt


def test_while_it_drains_new_requests_get_503_with_retry_after_and_running_ones_end(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "_LOOK_S", 0.01)

    async def scenario(client: Client, model: SteppedModel) -> None:
        redis = connect_redis(redis_url)
        network = Draining(redis, client.jobs)
        running = client.ask(ASKED | {"stream": True})
        await client.new_job()
        drained = asyncio.create_task(network.drain(300))
        async with client.ingress.client(client.api_key) as http:
            async with asyncio.timeout(60):
                while not await redis.get("azu:jobs:draining"):
                    await asyncio.sleep(0.01)
            refused = await http.post("/v1/completions", json=ASKED)
            health = await http.get("/health")
            submitted = {"user_address": client.address, "model_id": ASKED["model"], "prompt": "a"}
            also = await http.post("/submit", json=submitted | {"est_tokens": 1})
        for answer in (refused, also):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "draining"
            assert 290 <= int(answer.headers["retry-after"]) <= 300
        assert health.status_code == 503
        assert health.json()["problems"] == ["this network is about to stop and takes no new jobs"]
        assert not drained.done()

        await model.step(STEPS)

        assert (await running.answer()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(drained, 60) == 0
        await redis.aclose()

    asyncio.run(play_with_client(redis_url, tmp_path, scenario))


def test_a_job_that_does_not_end_in_time_holds_the_stop_up_no_longer(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "_NOTED_MS", 1)

    async def scenario(client: Client, model: SteppedModel) -> None:
        redis = connect_redis(redis_url)
        network = Draining(redis, client.jobs)
        running = client.ask(ASKED)
        await client.new_job()

        assert await network.drain(0) == 1
        await asyncio.sleep(0.01)
        await network.check()  # no call says any more that the network stops

        await model.step(STEPS)
        await running.answer()
        await redis.aclose()

    asyncio.run(play_with_client(redis_url, tmp_path, scenario))
