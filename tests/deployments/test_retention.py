"""What is kept of prompts and answers, over HTTP: until they were read, until a day, or until DELETE."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from azu.clock import wall_clock_ms
from azu.jobs.record import QUEUE
from tests.deployments.local import LocalIngress, local_ingress

MODEL = "azu/tiny-dense"
ASKED = {"model": MODEL, "prompt": "Hello", "max_tokens": 3}


@pytest.fixture
def play(redis_url: str, tmp_path: Path) -> Callable[..., None]:
    """Run a scenario with an ingress, a user's client and the user's address."""

    async def run(scenario: Any) -> None:
        async with local_ingress(redis_url, tmp_path) as ingress:
            address, key = await ingress.user()
            async with ingress.client(key) as http:
                await asyncio.wait_for(scenario(ingress, http, address), 60)

    return lambda scenario: asyncio.run(run(scenario))


async def out_of_the_queue(ingress: LocalIngress) -> None:
    while await ingress.model.jobs._redis.xlen(QUEUE):
        await asyncio.sleep(0.01)


async def has_prompt(ingress: LocalIngress, job_id: str, later_ms: int = 15_000) -> bool:
    """Archive as a scheduler without retention does a little later; say if the job has its prompt."""
    await ingress.model.jobs.archive(wall_clock_ms() + later_ms, 0)
    record = await ingress.model.jobs.get(job_id)
    assert record is not None
    return bool(record.job.prompt_token_ids)


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_over_a_connection_is_delivered_when_it_was_sent(play, is_stream: bool) -> None:
    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient, address: str) -> None:
        answer = await http.post("/v1/completions", json=ASKED | {"stream": is_stream})
        (line,) = (await http.get("/v1/jobs")).json()["data"]
        assert line["job_id"] in answer.text

        assert not await has_prompt(ingress, line["job_id"])

        assert (await http.get(f"/v1/receipts/{line['job_id']}")).status_code == 200

    play(scenario)


@pytest.mark.parametrize("path", ["/results/{}", "/v1/jobs/{}/stream"])
def test_a_submitted_answer_is_delivered_when_it_was_asked_for(play, path: str) -> None:
    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient, address: str) -> None:
        submit = {"model_id": MODEL, "prompt": "Hello", "est_tokens": 3, "user_address": address}
        job_id = (await http.post("/submit", json=submit)).json()["job_id"]
        while (await http.get("/v1/jobs")).json()["data"][0]["status"] != "done":
            await asyncio.sleep(0.01)
        assert await has_prompt(ingress, job_id)

        assert (await http.get(path.format(job_id))).status_code == 200

        assert not await has_prompt(ingress, job_id, 80_000)

    play(scenario)


def test_a_deleted_job_has_no_texts_any_more_and_its_receipt_stays(play) -> None:
    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient, address: str) -> None:
        job_id = (await http.post("/v1/completions", json=ASKED)).json()["azu"]["job_id"]
        (listed,) = (await http.get("/v1/jobs")).json()["data"]
        before = (await http.get(f"/results/{job_id}")).json()
        receipt = (await http.get(f"/v1/receipts/{job_id}")).json()
        assert before["token_ids"]
        _, stranger = await ingress.user()
        async with ingress.client(stranger) as other:
            assert (await other.delete(f"/v1/jobs/{job_id}")).status_code == 403
        assert (await http.get(f"/results/{job_id}")).json() == before

        for _ in range(2):
            assert (await http.delete(f"/v1/jobs/{job_id}")).json() == {"deleted": job_id}

        after = (await http.get(f"/results/{job_id}")).json()
        assert (after["text"], after["token_ids"], after["status"]) == ("", [], "done")
        assert (await http.get(f"/v1/receipts/{job_id}")).json() == receipt
        assert (await http.get("/v1/jobs")).json()["data"] == [listed]
        assert (await http.get(f"/v1/jobs/{job_id}")).json() == listed
        tokens = ("prompt_tokens", "completion_tokens", "charged_lamports")
        assert [listed[name] for name in tokens] == [receipt[name] for name in tokens]
        (key,) = (await http.get("/v1/auth/keys")).json()["data"]
        assert listed["key_id"] == key["key_id"]
        await out_of_the_queue(ingress)

    play(scenario)


def test_a_job_that_runs_is_not_deleted_and_one_that_is_unknown_is_not_found(play) -> None:
    async def scenario(ingress: LocalIngress, http: httpx.AsyncClient, address: str) -> None:
        ingress.model.delay_s = 0.3
        submit = {"model_id": MODEL, "prompt": "Hello", "est_tokens": 3, "user_address": address}
        job_id = (await http.post("/submit", json=submit)).json()["job_id"]

        refused = await http.delete(f"/v1/jobs/{job_id}")
        unknown = await http.delete("/v1/jobs/job-0")

        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_not_finished")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "job_not_found")
        while (await http.get("/v1/jobs")).json()["data"][0]["status"] != "done":
            await asyncio.sleep(0.01)
        assert (await http.get(f"/results/{job_id}")).json()["token_ids"]

    play(scenario)
