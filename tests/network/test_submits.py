"""Many submits at once start only the jobs that the balance covers."""

import asyncio
from collections import Counter

import httpx
import pytest

from azu.client import Client
from azu.launch.local_network import LocalNetwork
from tests.network.conftest import paying_user
from tests.network.test_money import settled
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

SUBMITS = 1_000
JOBS = 10
# Keys of one account, which share its limits.
KEYS = 10
TIMEOUT_S = 300
# One new token: it is delivered, so that a job costs all that was reserved for it.
JOB = {"model_id": "azu/tiny-dense", "prompt": "Hello", "est_tokens": 1}


async def submit_at_once(user: User, count: int) -> list[httpx.Response]:
    body = JOB | {"user_address": user.address}
    opened = [Client(user.url).login(user.account) for _ in range(KEYS)]
    # An address has so many connections.
    limits = httpx.Limits(max_connections=500)
    async with httpx.AsyncClient(base_url=user.url, timeout=TIMEOUT_S, limits=limits) as client:

        async def submit(api_key: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {api_key}"}
            while True:
                reply = await client.post("/submit", json=body, headers=headers)
                if reply.status_code != 429:
                    return reply
                # One account has only so many requests open, and so many a minute.
                await asyncio.sleep(float(reply.headers["retry-after"]))

        return await asyncio.gather(*(submit(opened[number % KEYS]) for number in range(count)))


def test_a_thousand_submits_at_once_start_the_ten_jobs_that_are_paid_for(
    network: LocalNetwork, user: User, figures: Counter[str]
) -> None:
    quoted = user.http.post(
        "/v1/quote", json={"model": JOB["model_id"], "prompt": JOB["prompt"], "max_tokens": 1}
    ).json()
    price = quoted["max_lamports"]
    payer = paying_user(network, "ten jobs", JOBS * price)

    replies = asyncio.run(submit_at_once(payer, SUBMITS))

    statuses = Counter(reply.status_code for reply in replies)
    assert statuses == {200: JOBS, 402: SUBMITS - JOBS}, statuses
    assert {reply.json()["error"]["code"] for reply in replies if reply.status_code == 402} == {
        "insufficient_balance"
    }
    assert settled(payer) == (0, 0)
    jobs = payer.http.get("/v1/jobs", params={"limit": 1000}).json()["data"]
    assert {job["job_id"] for job in jobs} == {
        reply.json()["job_id"] for reply in replies if reply.status_code == 200
    }
    assert [job["charged_lamports"] for job in jobs] == [price] * JOBS
    figures["submits at once against a balance for 10 jobs"] += SUBMITS
    figures["jobs started by them"] += len(jobs)
