"""The client in an event loop and the one without: the same calls, and jobs that end with their readers."""

import asyncio
import gc
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import anyio
import pytest

from azu.client import AsyncClient, AsyncStream, Client
from azu.errors import InsufficientBalance, Unavailable
from tests.client.answers import MODEL, last_chunk, piece
from tests.client.ingress import Ingress, Reply, running_ingress

COMPLETIONS = "POST /v1/completions"
CANCEL = "/v1/jobs/job-1/cancel"


@pytest.fixture
def ingress() -> Iterator[Ingress]:
    with running_ingress() as running:
        yield running


@pytest.fixture
def halted(ingress: Ingress) -> Iterator[Ingress]:
    """An ingress that sends one piece of an answer and the rest only once the job is cancelled."""
    cancelled = threading.Event()

    def chunks() -> Iterator[Any]:
        yield piece("Pa", after=1)
        cancelled.wait(30)
        yield {"error": Unavailable("its reader left", code="job_cancelled").to_openai()["error"]}

    def cancel(_: Any) -> Reply:
        cancelled.set()
        return Reply({})

    ingress.replies[COMPLETIONS] = lambda _: Reply(chunks=chunks())
    ingress.replies[f"POST {CANCEL}"] = cancel
    yield ingress
    cancelled.set()


def play(ingress: Ingress, scenario: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with AsyncClient(ingress.url, "azu-sk-key", timeout_s=10) as client:
            await scenario(client)

    asyncio.run(asyncio.wait_for(run(), 60))


def cancels(ingress: Ingress) -> int:
    return [request.path for request in ingress.requests].count(CANCEL)


async def cancelled(ingress: Ingress) -> None:
    while not cancels(ingress):
        await asyncio.sleep(0.01)


def public(kind: type) -> dict[str, inspect.Signature]:
    found = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    return {name: inspect.signature(value) for name, value in found.items() if callable(value)}


def test_both_clients_have_the_same_calls() -> None:
    here, there = public(Client), public(AsyncClient)

    assert here.keys() == there.keys()
    for name in here.keys() - {"stream", "chat_stream"}:
        assert here[name] == there[name]
    assert public(AsyncStream).keys() == {"chunks", "close", "result"}


def test_an_answer_streams_in_an_event_loop(ingress: Ingress) -> None:
    chunks = (piece("Pa"), piece("ris", finish="stop"), last_chunk(), "[DONE]")
    ingress.replies[COMPLETIONS] = Reply(chunks=chunks)

    async def scenario(client: AsyncClient) -> None:
        stream = client.stream("The capital", model=MODEL, max_tokens=7)
        assert [text async for text in stream] == ["Pa", "ris"]
        answer = await stream.result()
        assert (answer.text, answer.receipt.charged_lamports) == ("Paris", 60)
        assert (await client.generate("The capital", model=MODEL)).text == "Paris"

    play(ingress, scenario)
    assert cancels(ingress) == 0


def test_an_error_has_its_class_in_an_event_loop(ingress: Ingress) -> None:
    error = InsufficientBalance("you need 7 lamports more")
    ingress.replies[COMPLETIONS] = ingress.replies["GET /v1/balance"] = Reply(error.to_openai(), error.status)

    async def scenario(client: AsyncClient) -> None:
        for call in (client.balance(), client.generate("Hello", model=MODEL)):
            with pytest.raises(InsufficientBalance, match="7 lamports"):
                await call

    play(ingress, scenario)


def test_many_answers_come_at_once(ingress: Ingress) -> None:
    together = threading.Barrier(8)

    def chunks() -> Iterator[Any]:
        together.wait(30)
        yield from (piece("Paris", finish="stop"), last_chunk(), "[DONE]")

    ingress.replies[COMPLETIONS] = lambda _: Reply(chunks=chunks())

    async def scenario(client: AsyncClient) -> None:
        answers = await asyncio.gather(*(client.generate("The capital", model=MODEL) for _ in range(8)))
        assert [answer.text for answer in answers] == ["Paris"] * 8

    play(ingress, scenario)


async def by_its_block(client: AsyncClient) -> None:
    async with client.stream("Hello", model=MODEL) as stream:
        async for _ in stream:
            break


async def by_close(client: AsyncClient) -> None:
    stream = client.stream("Hello", model=MODEL)
    await anext(stream)
    await stream.close()
    await stream.close()


async def by_another_task(client: AsyncClient) -> None:
    stream = client.stream("Hello", model=MODEL)
    await anext(stream)
    reading = asyncio.create_task(stream.result())
    await asyncio.sleep(0)
    await stream.close()
    with pytest.raises(Unavailable, match="its reader left"):
        await reading


async def by_a_cancelled_task(client: AsyncClient) -> None:
    stream = client.stream("Hello", model=MODEL)
    await anext(stream)
    reading = asyncio.create_task(stream.result())
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def by_a_scope_that_cancels_every_wait(client: AsyncClient) -> None:
    """As a web framework does with what runs for a caller that hung up."""
    stream = client.stream("Hello", model=MODEL)
    with anyio.move_on_after(0.2) as scope:
        await stream.result()
    assert scope.cancelled_caught


async def by_nothing_that_holds_it(client: AsyncClient) -> None:
    await anext(client.stream("Hello", model=MODEL))
    gc.collect()


def test_a_reader_that_leaves_before_the_first_chunk_cancels_its_job(halted: Ingress) -> None:
    silent = threading.Event()

    def nothing() -> Iterator[Any]:
        silent.wait(30)
        yield from ()

    headers = {"x-job-id": "job-1"}
    halted.replies[COMPLETIONS] = lambda _: Reply(chunks=nothing(), headers=headers)

    async def scenario(client: AsyncClient) -> None:
        stream = client.stream("Hello", model=MODEL)
        reading = asyncio.create_task(stream.result())
        while not stream.job_id:
            await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.wait((reading,))

    play(halted, scenario)
    silent.set()
    assert cancels(halted) == 1


def test_a_stream_that_is_closed_before_the_network_answers_ends_its_job(halted: Ingress) -> None:
    closed, answer = threading.Event(), halted.replies[COMPLETIONS]

    def late(request: Any) -> Reply:
        closed.wait(30)
        assert callable(answer)
        return replace(answer(request), headers={"x-job-id": "job-1"})

    halted.replies[COMPLETIONS] = late

    async def scenario(client: AsyncClient) -> None:
        stream = client.stream("Hello", model=MODEL)
        reading = asyncio.create_task(stream.result())
        while not halted.requests:
            await asyncio.sleep(0.01)
        await stream.close()
        closed.set()
        with pytest.raises(Unavailable, match="its reader left"):
            await reading

    play(halted, scenario)
    assert cancels(halted) == 1


def test_a_stream_that_breaks_before_its_first_chunk_is_taken_up(ingress: Ingress) -> None:
    ingress.replies[COMPLETIONS] = Reply(chunks=(), headers={"x-job-id": "job-1"})
    whole = (piece("Paris", finish="stop"), last_chunk(), "[DONE]")
    ingress.replies["GET /v1/jobs/job-1/stream?chat=false&after=0"] = Reply(chunks=whole)

    with Client(ingress.url, "azu-sk-key") as client:
        assert client.generate("The capital", model=MODEL).text == "Paris"


@pytest.mark.parametrize(
    "leave",
    [
        by_its_block, by_close, by_another_task, by_a_cancelled_task, by_a_scope_that_cancels_every_wait,
        by_nothing_that_holds_it,
    ],
)  # fmt: skip
def test_a_reader_that_leaves_cancels_its_job_once(
    halted: Ingress, leave: Callable[[AsyncClient], Awaitable[None]]
) -> None:
    async def scenario(client: AsyncClient) -> None:
        await leave(client)
        await cancelled(halted)

    play(halted, scenario)
    assert cancels(halted) == 1


def at_its_blocks_end(client: Client) -> None:
    with client.stream("Hello", model=MODEL) as stream:
        next(stream)


def at_once(client: Client) -> None:
    next(client.stream("Hello", model=MODEL))
    gc.collect()


def from_another_thread(client: Client) -> None:
    stream = client.stream("Hello", model=MODEL)
    next(stream)

    def stop() -> None:
        while not stream._inner._chunks.ag_running:
            time.sleep(0.01)
        stream.close()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(Unavailable, match="its reader left"):
        stream.result()
    stopping.join()


@pytest.mark.parametrize("leave", [at_its_blocks_end, at_once, from_another_thread])
@pytest.mark.parametrize("in_a_notebook", [False, True])
def test_a_reader_without_an_event_loop_cancels_its_job_once(
    halted: Ingress, leave: Callable[[Client], None], in_a_notebook: bool
) -> None:
    async def cell(client: Client) -> None:
        leave(client)
        await asyncio.wait_for(cancelled(halted), 60)

    with Client(halted.url, "azu-sk-key", timeout_s=10) as client:
        asyncio.run(cell(client)) if in_a_notebook else leave(client)

    assert cancels(halted) == 1


def test_calls_and_streams_share_a_connection(ingress: Ingress) -> None:
    ingress.replies[COMPLETIONS] = Reply(chunks=(piece("Paris", finish="stop"), last_chunk(), "[DONE]"))
    ingress.replies["GET /v1/models"] = Reply({"object": "list", "data": []})

    async def scenario(client: AsyncClient) -> None:
        for _ in range(3):
            await client.models()
            await client.generate("The capital", model=MODEL)

    play(ingress, scenario)
    with Client(ingress.url, "azu-sk-key") as client:
        for _ in range(3):
            client.models()
            client.generate("The capital", model=MODEL)

    assert [len({one.connection for one in ingress.requests[at : at + 6]}) for at in (0, 6)] == [1, 1]


def test_a_stream_that_breaks_in_an_event_loop_continues(
    ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingress.replies[COMPLETIONS] = Reply(chunks=(piece("Pa", after=1),))
    rest = (piece("ris", after=2, finish="stop"), last_chunk(), "[DONE]")
    ingress.replies["GET /v1/jobs/job-1/stream?chat=false&after=1"] = Reply(chunks=rest)

    async def scenario(client: AsyncClient) -> None:
        assert (await client.generate("The capital", model=MODEL)).text == "Paris"

    play(ingress, scenario)
