"""The ingress answers every request, never with a 5xx, and a refused request moves no money."""

import asyncio
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from azu.jobs.redis import RedisJobs
from azu.money.ledger.transfers import Reserve
from tests.deployments.asgi import AsgiTarget
from tests.deployments.fuzz import Found, Sender, fuzz
from tests.deployments.local import ADMIN_KEY, LocalIngress, local_ingress, unhurried

pytestmark = pytest.mark.prove

SEED = int(os.environ.get("AZU_TEST_SEED", "1"))
REQUESTS = int(os.environ.get("AZU_TEST_FUZZ_REQUESTS", "3000"))
SENDERS = 24


async def sender_at(ingress: LocalIngress) -> Sender:
    address, api_key = await ingress.user()
    return Sender(address, api_key, lambda: ingress.money(address))


async def reserved_jobs(ingress: LocalIngress) -> set[str]:
    """Return the jobs that have or had a reservation."""
    journal = (await ingress.books.bookkeeper.ledger()).journal()
    return {entry.transfer.job_id async for entry in journal if isinstance(entry.transfer, Reserve)}


def test_no_request_breaks_the_ingress_and_no_refused_one_moves_money(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No request may reach the Hub.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    async def scenario() -> Found:
        async with local_ingress(redis_url, tmp_path, unhurried()) as ingress:
            senders = [await sender_at(ingress) for _ in range(SENDERS)]
            found = await fuzz(
                AsgiTarget(ingress.app), senders, requests=REQUESTS, seed=SEED, admin_key=ADMIN_KEY
            )
            jobs = RedisJobs.from_url(redis_url)
            written = {
                record.job.job_id for sender in senders for record in await jobs.of(sender.address, REQUESTS)
            }
            assert await reserved_jobs(ingress) == written
            assert (await ingress.books.bookkeeper.audit()).agrees
            return found

    found = asyncio.run(scenario())

    assert found.faults == []
    assert sum(found.statuses.values()) == REQUESTS
    assert found.statuses[200] > REQUESTS / 20, "too few good requests to show anything"
    assert found.refused > REQUESTS / 4
