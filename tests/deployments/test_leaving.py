"""What a client pays that leaves before its answer is whole: through ingress, engine and ledger."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from azu.config import NetworkPolicy
from azu.errors import ShardError
from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobOutcome, JobState
from azu.units import LAMPORTS_PER_HYPE
from tests.builders import OWNERS
from tests.deployments.local import LocalIngress, local_ingress, policy_with
from tests.deployments.stepped import CHUNK_TOKENS, NUM_LAYERS, SteppedModel
from tests.few import few

PRICE = 2 * NUM_LAYERS  # of a token
NUM_PROMPT = 64
ASKED: dict[str, Any] = {
    "model": "azu/tiny-dense", "prompt": list(range(5, 5 + NUM_PROMPT)), "max_tokens": 5, "ignore_eos": True
}  # fmt: skip


class Client:
    """A client whose requests are of one key, and which can leave."""

    def __init__(self, ingress: LocalIngress, address: str, api_key: str) -> None:
        self.ingress, self.address, self.api_key = ingress, address, api_key
        self.jobs = RedisJobs.from_url(ingress.config.redis_url)

    def ask(self, body: dict[str, Any], app: ASGIApp | None = None, **headers: str) -> "Asking":
        """Begin a request, to another ingress if `app` is given."""
        return Asking(app or self.ingress.app, self.api_key, body, headers)

    async def job_ids(self) -> list[str]:
        return [record.job.job_id for record in await self.jobs.of(self.address, 100)]

    async def new_job(self) -> str:
        """Return the id of the latest job, once it runs."""
        async with asyncio.timeout(60):
            while (
                not (found := await self.jobs.of(self.address, 1)) or found[0].state is not JobState.RUNNING
            ):
                await asyncio.sleep(0.001)
        return found[0].job.job_id

    async def ended(self, job_id: str) -> JobOutcome:
        """Wait for a job's end and return it."""
        async with asyncio.timeout(60):
            *_, last = [event async for event in self.jobs.events(job_id)]
        assert isinstance(last, JobOutcome)
        return last

    async def spent(self, deposited: int = LAMPORTS_PER_HYPE) -> int:
        """Return what the jobs of the client cost; nothing may be reserved."""
        books = self.ingress.books.bookkeeper
        assert (await books.totals()).sum_lamports == 0
        balance = await books.balance(self.address)
        assert balance.reserved_lamports == 0
        return deposited - balance.available_lamports


class Asking:
    """One request on its way; its handler is cancelled when its client leaves, as by Serve."""

    def __init__(self, app: ASGIApp, api_key: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        self._gone = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        self.status = 0
        self.received = b""
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [
                (b"authorization", f"Bearer {api_key}".encode()), (b"content-type", b"application/json")
            ],
            "server": ("azu.test", 80), "client": ("127.0.0.1", 4),
        }  # fmt: skip
        scope["headers"] += [
            (name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()
        ]
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def leave(self) -> None:
        """Disconnect and wait until the ingress knows."""
        self._gone.set()
        self.task.cancel()
        await asyncio.wait({self.task}, timeout=60)
        assert self.task.done()

    async def answer(self) -> bytes:
        """Return the whole answer."""
        await asyncio.wait_for(self.task, 60)
        return self.received

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.received += message.get("body", b"")


Scenario = Callable[[Client, SteppedModel], Awaitable[None]]


async def play_with_client(
    redis_url: str, home: Path, scenario: Scenario, lamports: int = LAMPORTS_PER_HYPE, **limits: float
) -> None:
    """Run a scenario with a client that has deposited so much."""
    policy = policy_with(request_burst=1000, **limits)
    with pytest.MonkeyPatch.context() as patience:
        # A process of a busy machine that is late is not taken for a Redis that is away.
        for name in ("deployments.services._SILENCE_S", "deployments.services._BOOKS_SILENCE_S"):
            patience.setattr(name, 30.0)
        patience.setattr("azu.money.bookkeeping._SILENCE_S", 30.0)
        await _play(redis_url, home, scenario, policy, lamports)


async def _play(redis_url: str, home: Path, scenario: Scenario, policy: NetworkPolicy, lamports: int) -> None:
    async with local_ingress(redis_url, home, policy, make_model=SteppedModel) as ingress:
        address, api_key = await ingress.user(lamports)
        try:
            await asyncio.wait_for(scenario(Client(ingress, address, api_key), ingress.model), 200)
        finally:
            await ingress.model.close()


@pytest.fixture
def play(redis_url: str, tmp_path: Path) -> Callable[[Scenario], None]:
    """Run a scenario in a network in which a job that is left ends at once."""
    return lambda scenario: asyncio.run(play_with_client(redis_url, tmp_path, scenario, repeat_within_s=0))


def test_a_client_that_leaves_in_its_prefill_pays_for_the_prompt_tokens_that_ran(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        paid = earned = 0
        for stream in (True, False):
            for num_steps in range(10):
                asking = client.ask(ASKED | {"stream": stream, "seed": num_steps})
                job_id = await client.new_job()
                await model.step(num_steps)
                await model.until_sent()  # a job that is left before its first step has none to answer
                await asking.leave()
                receipt = (await client.ended(job_id)).receipt

                ran = CHUNK_TOKENS * num_steps
                assert (receipt.prompt_tokens, receipt.completion_tokens) == (ran, 0)
                assert (receipt.charged_lamports, receipt.held_lamports) == (ran * PRICE, 0)
                paid += ran * PRICE
                earned += ran * PRICE * 80 // 100
                assert await client.spent() == paid
                books = client.ingress.books.bookkeeper
                assert (await books.earnings(OWNERS[0])).earned_lamports == earned
                await model.step()

    play(scenario)


def test_a_client_that_leaves_after_tokens_pays_for_its_prompt_and_them(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        for stream in (True, False):
            asking = client.ask(ASKED | {"stream": stream})
            job_id = await client.new_job()
            await model.step(NUM_PROMPT // CHUNK_TOKENS + 2)
            async with asyncio.timeout(60):
                while await client.jobs.delivered(job_id) < 3:
                    await asyncio.sleep(0.001)
            await model.until_sent()
            await asking.leave()

            assert (await client.ended(job_id)).receipt.completion_tokens == 3
            await model.step()
        assert await client.spent() == 2 * (NUM_PROMPT + 3) * PRICE

    play(scenario)


def test_what_azu_ends_before_the_first_token_costs_nothing(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        asking = client.ask(ASKED | {"stream": True})
        job_id = await client.new_job()
        await model.step(5)
        model.runner.end(job_id, ShardError("a shard is damaged"))

        assert b"bad_shard" in await asking.answer()
        assert (await client.ended(job_id)).state is JobState.FAILED
        assert await client.spent() == 0

    play(scenario)


@pytest.mark.parametrize("stream", few([True, False]))
def test_an_answer_that_azu_cannot_read_costs_nothing_before_its_first_token(
    play, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    broken = asyncio.Event()

    async def follow(*_: Any, **__: Any) -> Any:
        await broken.wait()
        raise ZeroDivisionError("in a decoder")
        yield

    monkeypatch.setattr("deployments.completions.follow", follow)

    async def scenario(client: Client, model: SteppedModel) -> None:
        asking = client.ask(ASKED | {"stream": stream})
        job_id = await client.new_job()
        await model.step(5)
        broken.set()

        assert (await asking.answer(), asking.status)[1] == 500
        assert (await client.ended(job_id)).state is JobState.CANCELLED
        assert await client.spent() == 0

    play(scenario)


def test_eight_answers_to_one_prompt_pay_for_it_once(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        async with client.ingress.client(client.api_key) as http:
            size = {"model": ASKED["model"], "tokens": NUM_PROMPT, "max_tokens": 5, "n": 8}
            quoted = (await http.post("/v1/quote", json=size)).json()
            refused = [
                (await http.post(path, json=body | {"n": 9})).json()["error"]["param"]
                for path, body in (("/v1/completions", ASKED), ("/v1/quote", size))
            ]
        assert refused == ["n", "n"]
        stepping = asyncio.create_task(model.keep_stepping())
        asking = client.ask(ASKED | {"n": 8})
        answer = json.loads(await asking.answer())
        stepping.cancel()

        assert [len(choice["text"]) > 0 for choice in answer["choices"]] == [True] * 8
        assert answer["usage"]["prompt_tokens"] == NUM_PROMPT
        assert answer["usage"]["completion_tokens"] == 8 * 5
        (job_id,) = await client.job_ids()
        record = await client.jobs.get(job_id)
        assert record is not None
        reserved = record.job.reserved_lamports
        assert quoted["max_lamports"] == reserved == (NUM_PROMPT + 8 * 5) * PRICE
        receipt = (await client.ended(job_id)).receipt
        assert (receipt.prompt_tokens, receipt.completion_tokens) == (NUM_PROMPT, 40)
        assert await client.spent() == answer["usage"]["cost_lamports"] == (NUM_PROMPT + 40) * PRICE

    play(scenario)


def test_eight_answers_that_are_left_in_their_prefill_pay_for_what_ran_of_one_prompt(play) -> None:
    async def scenario(client: Client, model: SteppedModel) -> None:
        asking = client.ask(ASKED | {"n": 8, "stream": True})
        job_id = await client.new_job()
        await model.step(9)
        most = max(sequence.num_ran for sequence in model.engine._sequences.values())
        await asking.leave()

        assert (await client.ended(job_id)).receipt.prompt_tokens == most > 0
        assert await client.spent() == most * PRICE

    play(scenario)
