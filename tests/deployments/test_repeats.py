"""A request that comes again after its client hung up goes on with its job, and nothing is paid twice."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobState
from deployments.ingress import build_api
from tests.deployments.local import LocalServices
from tests.deployments.stepped import CHUNK_TOKENS, SteppedModel
from tests.deployments.test_leaving import ASKED, NUM_PROMPT, PRICE, Client, play_with_client

NUM_PREFILL = NUM_PROMPT // CHUNK_TOKENS
WHOLE = (NUM_PROMPT + 5) * PRICE
STREAMED = ASKED | {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def play(redis_url: str, tmp_path: Path) -> Callable[..., None]:
    """Run a scenario in a network in which a job waits 10 minutes for its client."""
    return lambda scenario, **given: asyncio.run(play_with_client(redis_url, tmp_path, scenario, **given))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.002)


async def waiting(client: Client, job_id: str) -> None:
    """Wait until the scheduler has stopped a job that was left."""

    async def is_waiting() -> bool:
        record = await client.jobs.get(job_id)
        return record is not None and record.cancelled and record.state is JobState.QUEUED

    await until(is_waiting)


async def left(client: Client, model: SteppedModel, num_steps: int, body: dict[str, Any] = STREAMED) -> str:
    """Ask, leave after some steps and wait until the job stands still; return its id."""
    asking = client.ask(body)
    job_id = await client.new_job()
    await model.step(num_steps)
    num_tokens = max(0, num_steps - NUM_PREFILL + 1)
    await until(lambda: has_tokens(client.jobs, job_id, num_tokens))
    await model.until_sent()
    await asking.leave()
    await waiting(client, job_id)
    await model.step()  # it was on its way
    await asyncio.sleep(0.02)
    assert not model.sent, "a job that is left computes nothing"
    return job_id


async def has_tokens(jobs: RedisJobs, job_id: str, number: int) -> bool:
    return await jobs.delivered(job_id) >= number


async def are_back(jobs: RedisJobs, job_id: str, number: int) -> bool:
    return await jobs._redis.scard(f"azu:job:{job_id}:readers") == number


async def answered(client: Client, model: SteppedModel, *bodies: dict[str, Any], **given: Any) -> list[bytes]:
    """Ask at once and answer every step; return the answers."""
    asking = [client.ask(body, **given) for body in bodies]
    stepping = asyncio.create_task(model.keep_stepping())
    try:
        return [await one.answer() for one in asking]
    finally:
        stepping.cancel()


def text_of(answer: bytes) -> str:
    """Return the text of a whole answer or a stream."""
    if answer.startswith(b"{"):
        return str(json.loads(answer)["choices"][0]["text"])
    assert answer.endswith(b"data: [DONE]\n\n"), answer
    chunks = [json.loads(one) for one in answer.decode().split("data: ")[1:-1]]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])


@pytest.mark.parametrize("body", [STREAMED, ASKED], ids=["stream", "whole"])
def test_a_repeated_request_goes_on_with_its_job_and_pays_once(play, body: dict[str, Any]) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        (other,) = await answered(client, model, body | {"seed": 1})
        for number, num_steps in enumerate((3, NUM_PREFILL + 1), 2):
            job_id = await left(client, model, num_steps, body)
            (answer,) = await answered(client, model, body)

            assert text_of(answer) == text_of(other) != ""
            assert job_id.encode() in answer
            receipt = (await client.ended(job_id)).receipt
            assert (receipt.prompt_tokens, receipt.completion_tokens) == (NUM_PROMPT, 5)
            assert (await client.spent(), len(await client.job_ids())) == (number * WHOLE, number)
            assert receipt.held_lamports == 0
        # The answer has arrived: the same request is another job now.
        await answered(client, model, body)
        assert (await client.spent(), len(await client.job_ids())) == (4 * WHOLE, 4)

    play(scenario)


def test_twenty_repeats_at_once_pay_once(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        job_id = await left(client, model, 5)
        asking = [client.ask(STREAMED) for _ in range(20)]
        await until(lambda: are_back(client.jobs, job_id, 20))
        stepping = asyncio.create_task(model.keep_stepping())
        answers = [await one.answer() for one in asking]
        stepping.cancel()

        assert len({text_of(answer) for answer in answers}) == 1
        assert (await client.job_ids(), await client.spent()) == ([job_id], WHOLE)

    play(scenario)


def test_two_equal_requests_at_once_are_two_jobs(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        await answered(client, model, STREAMED, STREAMED)
        assert (await client.spent(), len(await client.job_ids())) == (2 * WHOLE, 2)

    play(scenario)


def test_a_repeated_request_goes_on_after_the_ingress_and_the_scheduler_started_again(
    redis_url: str, tmp_path: Path
) -> None:
    seen: list[str] = []

    async def leave(client: Client, model: SteppedModel) -> None:
        seen.extend([client.address, client.api_key, await left(client, model, 5)])

    async def come_again(client: Client, model: SteppedModel) -> None:
        client.address, client.api_key, job_id = seen
        (answer,) = await answered(client, model, STREAMED)
        assert job_id.encode() in answer
        assert (await client.job_ids(), await client.spent()) == ([job_id], WHOLE)

    for scenario in (leave, come_again):
        asyncio.run(play_with_client(redis_url, tmp_path, scenario))


def test_a_client_of_an_ingress_that_died_goes_on_with_its_job_at_another(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        client.ask(STREAMED)
        job_id = await client.new_job()
        departures = client.ingress.app.state.services.intake.departures
        another = build_api(client.ingress.config, LocalServices)
        async with another.router.lifespan_context(another):
            # Its mark is as old as if it had not beaten for a minute.
            departures._kept_ms = 0
            await client.jobs._redis.pexpire(f"azu:jobs:ingress:{departures.ingress}", 540_000)
            asking = client.ask(STREAMED, another)
            await until(lambda: are_back(client.jobs, job_id, 1))
            stepping = asyncio.create_task(model.keep_stepping())
            assert job_id.encode() in await asking.answer()
            stepping.cancel()
        assert (await client.job_ids(), await client.spent()) == ([job_id], WHOLE)

    play(scenario)


def test_a_job_that_waits_gives_its_money_to_another_and_ends_with_what_ran(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        job_id = await left(client, model, 5)
        (answer,) = await answered(client, model, ASKED | {"seed": 7})

        assert text_of(answer)
        receipt = (await client.ended(job_id)).receipt
        assert receipt.charged_lamports == 5 * CHUNK_TOKENS * PRICE
        assert await client.spent(2 * WHOLE - 1) == WHOLE + receipt.charged_lamports
        (again,) = await answered(client, model, STREAMED | {"max_tokens": 1, "seed": 8})
        assert b"insufficient_balance" in again

    play(scenario, lamports=2 * WHOLE - 1)


def test_a_job_ends_at_its_clients_word_and_charges_what_ran(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        job_id = await left(client, model, 5)
        async with client.ingress.client(client.api_key) as http:

            async def says_why() -> bool:
                listed = (await http.get("/v1/jobs")).json()["data"][0]
                return listed["status"] == "queued" and "hung up" in listed["phase"]["text"]

            await until(says_why)
            assert (await http.post(f"/v1/jobs/{job_id}/cancel")).status_code == 200
            await client.ended(job_id)
            assert (await http.post(f"/v1/jobs/{job_id}/cancel")).json()["status"] == "cancelled"
        assert await client.spent() == 5 * CHUNK_TOKENS * PRICE

    play(scenario)


def test_a_client_that_knows_its_job_comes_back_to_its_stream(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        job_id = await left(client, model, NUM_PREFILL + 1)
        stepping = asyncio.create_task(model.keep_stepping())
        async with client.ingress.client(client.api_key) as http:
            rest = (await http.get(f"/v1/jobs/{job_id}/stream", params={"after": 2})).content
        stepping.cancel()

        assert text_of(rest)
        assert (await client.ended(job_id)).state is JobState.DONE
        assert await client.spent() == WHOLE

    play(scenario)


def test_a_request_may_have_a_name_of_its_own(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        asking = client.ask(STREAMED, idempotency_key="one")
        job_id = await client.new_job()
        await model.step(2)
        await model.until_sent()
        await asking.leave()
        await waiting(client, job_id)
        await model.step()
        # The same content is another request without that name.
        (other,) = await answered(client, model, STREAMED)
        (answer,) = await answered(client, model, STREAMED | {"user": "me"}, idempotency_key="one")

        assert (job_id.encode() in other, job_id.encode() in answer) == (False, True)
        assert await client.spent() == 2 * WHOLE

    play(scenario)


class Impatient(httpx.AsyncBaseTransport):
    """A transport on which a client loses patience with its first requests, in the middle of the prefill."""

    def __init__(self, client: Client, model: SteppedModel, num_lost: int) -> None:
        self._client, self._model, self._num_lost = client, model, num_lost

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answering = asyncio.create_task(self._client.ingress.transport.handle_async_request(request))
        if not self._num_lost:
            return await answering
        self._num_lost -= 1
        job_id = await self._client.new_job()
        await self._model.step(3)
        answering.cancel()
        with suppress(asyncio.CancelledError):
            await answering
        await waiting(self._client, job_id)
        await self._model.step()
        raise httpx.ReadTimeout("the answer takes too long", request=request)


def test_openais_client_that_repeats_by_itself_pays_once(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        http = httpx.AsyncClient(transport=Impatient(client, model, 2))
        openai_client = openai.AsyncOpenAI(
            base_url="http://azu.test/v1", api_key=client.api_key, http_client=http
        )
        asking = asyncio.create_task(
            openai_client.completions.create(
                model=ASKED["model"], prompt=ASKED["prompt"], max_tokens=5, extra_body={"ignore_eos": True}
            )
        )

        async def is_repeated_twice() -> bool:
            records = await client.jobs.of(client.address, 1)
            return (
                bool(records)
                and (await client.jobs._redis.hget(f"azu:job:{records[0].job.job_id}", "returns")) == "2"
            )

        await until(is_repeated_twice)
        stepping = asyncio.create_task(model.keep_stepping())
        answer = await asking
        stepping.cancel()

        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        assert (await client.spent(), len(await client.job_ids())) == (WHOLE, 1)

    play(scenario)
