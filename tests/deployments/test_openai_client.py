"""OpenAI's own client, unchanged, against the ingress: streams, usage, exceptions, repeated requests."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from azu.config import NetworkPolicy
from azu.errors import HarmfulRequest, NumericsError, ShardError
from azu.metrics import TIME_PER_TOKEN, Meter, MetricsSnapshot
from azu.protocol.job import DeploymentStatus
from tests.deployments.local import LocalIngress, NoNodes, local_ingress, policy_with
from tests.models.questions import built_in_folder

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ASKED = {"model": "azu/tiny-dense", "messages": MESSAGES, "max_tokens": 5}
Scenario = Callable[[LocalIngress, openai.AsyncOpenAI, list[httpx.Request]], Awaitable[None]]


@pytest.fixture
def play(redis_url: str, tmp_path: Path) -> Callable[..., None]:
    async def run(scenario: Scenario, policy: NetworkPolicy | None, lamports: int) -> None:
        sent: list[httpx.Request] = []

        async def remember(request: httpx.Request) -> None:
            sent.append(request)

        async with local_ingress(redis_url, tmp_path, policy) as ingress:
            _, api_key = await ingress.user(lamports)
            async with ingress.client(event_hooks={"request": [remember]}) as http:
                client = openai.AsyncOpenAI(base_url="http://azu.test/v1", api_key=api_key, http_client=http)
                await asyncio.wait_for(scenario(ingress, client, sent), 120)

    return lambda scenario, policy=None, lamports=10**8: asyncio.run(run(scenario, policy, lamports))


def test_a_stream_ends_with_a_usage_chunk_that_has_the_cost(play) -> None:
    async def scenario(_: LocalIngress, client: openai.AsyncOpenAI, sent: list[httpx.Request]) -> None:
        stream = await client.chat.completions.create(
            **ASKED, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        answer = await client.chat.completions.create(**ASKED)

        *said, last = chunks
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.total_tokens == last.usage.prompt_tokens + 3
        assert last.usage.cost_lamports == answer.usage.cost_lamports == 2 * 6 * last.usage.total_tokens
        text = "".join(chunk.choices[0].delta.content or "" for chunk in said)
        assert text == answer.choices[0].message.content
        assert [chunk.choices[0].finish_reason for chunk in said][-1] == "stop"
        assert all(chunk.usage is None for chunk in said)
        assert answer._request_id
        assert "receipt" not in last.azu
        assert stream.response.headers["x-job-id"] == last.azu["job_id"]
        with_receipt = {"include_usage": True, "include_receipt": True}
        asked = await client.chat.completions.create(**ASKED, stream=True, stream_options=with_receipt)
        *_, last = [chunk async for chunk in asked]
        assert last.azu["receipt"]["charged_lamports"] == last.usage.cost_lamports
        plain = await client.completions.create(model="azu/tiny-dense", prompt=[5, 6, 7], max_tokens=2)
        assert (plain.usage.prompt_tokens, plain.choices[0].finish_reason) == (3, "length")

    play(scenario)


def test_models_have_their_price_and_their_length_limit(play) -> None:
    async def scenario(_: LocalIngress, client: openai.AsyncOpenAI, sent: list[httpx.Request]) -> None:
        models = {model.id: model async for model in client.models.list()}
        dense = await client.models.retrieve("azu/tiny-dense")

        assert set(models) == {"azu/tiny-dense", "azu/tiny-moe"}
        assert models["azu/tiny-dense"] == dense
        assert dense.context_length == dense.max_model_len == 1024
        assert dense.lamports_per_token == 2 * dense.num_layers
        assert (dense.deployed, dense.state, dense.tokens_per_s) == (False, "ready", None)

    play(scenario)


class Measured(NoNodes):
    """A scheduler with two pipelines of a model, one of them broken, and a model that is slow."""

    async def deployments(self) -> tuple[DeploymentStatus, ...]:
        states = {"azu/tiny-dense": ("running", "broken"), "azu/tiny-moe": ("broken", "slow")}
        return tuple(
            DeploymentStatus(model_id, "r", state) for model_id, found in states.items() for state in found
        )

    async def metrics(self) -> MetricsSnapshot:
        meter = Meter()
        for seconds in (0.01, 0.03):
            meter.observe(TIME_PER_TOKEN, seconds, "azu/tiny-dense")
        return meter.snapshot()


def test_models_have_the_state_of_their_best_pipeline_and_the_speed_that_was_measured(play) -> None:
    async def scenario(ingress: LocalIngress, client: openai.AsyncOpenAI, sent: list[httpx.Request]) -> None:
        ingress.app.state.services._actors["scheduler"] = Measured()
        found = {model.id: model async for model in client.models.list()}

        assert {name: (one.state, one.deployed) for name, one in found.items()} == {
            "azu/tiny-dense": ("running", True), "azu/tiny-moe": ("slow", True),
        }  # fmt: skip
        assert found["azu/tiny-dense"].tokens_per_s == pytest.approx(50)
        assert found["azu/tiny-moe"].tokens_per_s is None

    play(scenario)


REFUSED = [
    ({"max_tokens": -1}, openai.BadRequestError, 400, "max_tokens"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, 400, "response_format"),
    ({"model": "azu/unknown"}, openai.NotFoundError, 404, "model"),
    ({"model": "../../etc"}, openai.BadRequestError, 400, "model"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own_exceptions_and_not_repeated(play, stream: bool) -> None:
    async def scenario(_: LocalIngress, client: openai.AsyncOpenAI, sent: list[httpx.Request]) -> None:
        for change, kind, status, param in REFUSED:
            with pytest.raises(kind) as refused:
                await client.chat.completions.create(**ASKED | change, stream=stream)
            assert (refused.value.status_code, refused.value.param) == (status, param)
        assert len(sent) == len(REFUSED)

        with pytest.raises(openai.AuthenticationError) as unknown:
            await client.with_options(api_key="azu-sk-wrong").chat.completions.create(**ASKED)
        assert unknown.value.code == "invalid_api_key"

    play(scenario)


def test_without_money_no_request_is_repeated(play) -> None:
    async def scenario(_: LocalIngress, client: openai.AsyncOpenAI, sent: list[httpx.Request]) -> None:
        with pytest.raises(openai.APIStatusError) as refused:
            await client.chat.completions.create(**ASKED)
        assert (refused.value.status_code, refused.value.code) == (402, "insufficient_balance")
        assert len(sent) == 1

    play(scenario, lamports=0)


def test_a_charged_request_is_not_repeated_and_a_free_one_is(play) -> None:
    async def scenario(ingress: LocalIngress, client: openai.AsyncOpenAI, sent: list[httpx.Request]) -> None:
        ingress.model.error = ShardError("a shard is damaged")
        with pytest.raises(openai.InternalServerError) as charged:
            await client.chat.completions.create(**ASKED)
        assert charged.value.status_code == 500
        assert charged.value.response.headers["x-should-retry"] == "false"
        assert len(sent) == 1

        ingress.model.token_ids, ingress.model.silent = (), True
        with pytest.raises(openai.InternalServerError) as free:
            await client.chat.completions.create(**ASKED)
        assert "x-should-retry" not in free.value.response.headers
        assert len(sent) == 1 + 3

        for harmful in (
            HarmfulRequest("workers were lost"),
            NumericsError("not finite", node_id="a", layer=3),
        ):
            ingress.model.error = harmful
            sent.clear()
            with pytest.raises(openai.InternalServerError) as refused:
                await client.chat.completions.create(**ASKED)
            assert refused.value.code == harmful.code
            assert len(sent) == 1, "it would cost workers again"

    play(scenario)


def test_an_error_in_a_stream_is_raised_in_its_place(play) -> None:
    async def scenario(ingress: LocalIngress, client: openai.AsyncOpenAI, sent: list[httpx.Request]) -> None:
        ingress.model.error = ShardError("a shard is damaged")
        stream = await client.chat.completions.create(**ASKED, stream=True)
        first = await anext(stream)
        assert first.choices[0].delta.role == "assistant"
        with pytest.raises(openai.APIError, match="damaged"):
            [chunk async for chunk in stream]
        assert len(sent) == 1

    play(scenario)


def test_every_line_of_a_stream_ends_with_its_newline_alone(play) -> None:
    text = "a\u0085b\u2028c\u2029d"
    tokenizer = AutoTokenizer.from_pretrained(built_in_folder("azu/tiny-dense"))

    async def scenario(ingress: LocalIngress, client: openai.AsyncOpenAI, sent: list[httpx.Request]) -> None:
        ingress.model.token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        asked = ASKED | {"max_tokens": 200}
        stream = await client.chat.completions.create(**asked, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text
        async with ingress.client(client.api_key) as http:
            raw = (await http.post("/v1/chat/completions", json=asked | {"stream": True})).text
        assert raw.splitlines() == raw.split("\n")[:-1]

    play(scenario)


@pytest.mark.prove
def test_a_client_with_too_many_requests_waits_for_the_given_time(play) -> None:
    async def scenario(_: LocalIngress, client: openai.AsyncOpenAI, sent: list[httpx.Request]) -> None:
        impatient = client.with_options(max_retries=0)
        answers = await asyncio.gather(*(impatient.models.list() for _ in range(9)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
        assert refused
        assert all(1 <= int(error.response.headers["retry-after"]) <= 3 for error in refused)
        assert len(sent) == 9

        await client.with_options(max_retries=3).models.list()

    play(scenario, policy_with(requests_per_minute=20, request_burst=2))
