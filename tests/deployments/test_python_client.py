"""The Python clients of azu against the ingress: answers with their receipts, quotes, and jobs that end."""

import asyncio
import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

from azu import errors
from azu.api.receipts import ReceiptLines
from azu.client import AsyncClient, Client
from tests.deployments.served import Served, served

ASK = "What is the capital of France?"
MODEL = "azu/tiny-dense"
PATIENCE_S = 60


@pytest.fixture
def here(redis_url: str, tmp_path: Path) -> Iterator[Served]:
    with served(redis_url, tmp_path) as running:
        yield running


def test_an_answer_comes_with_its_receipt_whole_streamed_and_in_an_event_loop(here: Served) -> None:
    async def ask() -> tuple[str, ReceiptLines]:
        async with AsyncClient(here.url, here.api_key) as client:
            answer = await client.chat(ASK, model=MODEL, max_tokens=5, temperature=0.0, stop=["never"])
            return answer.text, answer.receipt

    with Client(here.url, here.api_key) as client:
        before = here.money()[0]
        answer = client.chat(ASK, model=MODEL, max_tokens=5)
        pieces = "".join(client.chat_stream(ASK, model=MODEL, max_tokens=5))
        text, receipt = asyncio.run(ask())
        several = client.generate([5, 6, 7], model=MODEL, max_tokens=2, n=2)
        paid = [client.receipt(job.job_id) for job in client.jobs()]

        assert answer.text == pieces == text != ""
        assert [choice.text for choice in several.choices] == [several.text] * 2
        assert [answer.receipt, receipt, several.receipt] == [paid[3], paid[1], paid[0]]
        assert sum(one.charged_lamports for one in paid) == before - here.money()[0]
        assert (answer.difference, several.difference) == (None, None)
        assert several.receipt.completion_tokens == several.received_tokens == 4


def test_a_quote_is_the_most_that_an_answer_costs(here: Served) -> None:
    with Client(here.url, here.api_key) as client:
        quoted = client.quote(ASK, model=MODEL, max_tokens=2)
        charged = client.generate(ASK, model=MODEL, max_tokens=2, ignore_eos=True).receipt.charged_lamports

        assert quoted.max_lamports == charged
        with pytest.raises(errors.InvalidRequest, match="the prompt, the messages or"):
            client.quote(model=MODEL)


def test_a_stream_that_is_closed_cancels_its_job_and_the_next_calls_go_on(here: Served) -> None:
    here.ingress.model.token_ids, here.ingress.model.pause_s = (70,) * 500, 0.05
    told: queue.Queue[str] = queue.Queue()

    async def cancel(job_id: str) -> None:
        told.put(job_id)

    here.ingress.model.cancel = cancel

    async def leave() -> str:
        async with AsyncClient(here.url, here.api_key) as client:
            async with client.stream(ASK, model=MODEL, max_tokens=400) as stream:
                async for _ in stream:
                    break
            return (await client.jobs(1))[0].job_id

    with Client(here.url, here.api_key) as client:
        with client.stream(ASK, model=MODEL, max_tokens=400) as stream:
            next(stream)
        closed = client.jobs(1)[0].job_id

        assert told.get(timeout=PATIENCE_S) == closed
        left = asyncio.run(leave())
        while (last := told.get(timeout=PATIENCE_S)) == closed:
            pass
        assert last == left != closed


@pytest.mark.prove
def test_a_parameter_out_of_its_bounds_is_refused_by_name(here: Served) -> None:
    with Client(here.url, here.api_key) as client:
        with pytest.raises(errors.InvalidRequest) as refused:
            client.chat(ASK, model=MODEL, temperature=3.0)

        assert refused.value.param == "temperature"
