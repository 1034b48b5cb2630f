"""The books end under eight streams: each goes on and is settled later, and new requests are told."""

import asyncio
import time
from pathlib import Path

from azu.jobs.redis import RedisJobs
from azu.protocol.job import JobState
from tests.deployments.local import LocalIngress, local_ingress, unhurried
from tests.deployments.test_redis_says_no import CLIENTS, COMPLETION, TOKENS, stream, text_of, until_all_run


def test_every_stream_goes_on_and_new_requests_are_told_to_come_again(redis_url: str, tmp_path: Path) -> None:
    async def play(ingress: LocalIngress) -> None:
        ingress.model.token_ids, ingress.model.pause_s = TOKENS, 0.02
        address, key = await ingress.user()
        jobs = RedisJobs.from_url(redis_url)
        async with ingress.client(key) as client:
            right = text_of(await stream(client))
            streams = [asyncio.create_task(stream(client)) for _ in range(CLIENTS)]
            await until_all_run(jobs, address, 1)
            await ingress.books.stop()
            began_s = time.monotonic()
            refused = await client.post("/v1/completions", json=COMPLETION)
            told_s = time.monotonic() - began_s
            health = await client.get("/health")

            assert refused.status_code == 503
            assert "the books did not answer" in refused.text
            assert int(refused.headers["retry-after"]) >= 1
            assert told_s < 1.5, told_s
            assert health.status_code == 503
            assert "the books are away" in health.text
            # All tokens come while the books are away; the answers wait for the settlement.
            while sum(record.delivered for record in await jobs.of(address, 100)) < (CLIENTS + 1) * len(
                TOKENS
            ):
                await asyncio.sleep(0.01)
            await ingress.books.start()
            assert {text_of(answer) for answer in await asyncio.gather(*streams)} == {right}
            assert (await client.get("/health")).status_code == 200
            records = await jobs.of(address, 100)
            assert [record.state for record in records] == [JobState.DONE] * (CLIENTS + 1)
            books = ingress.books.bookkeeper
            assert (await books.balance(address)).reserved_lamports == 0
            assert (await books.audit()).findings == ()

    async def run() -> None:
        async with local_ingress(redis_url, tmp_path / "home", unhurried()) as ingress:
            await asyncio.wait_for(play(ingress), 60)

    asyncio.run(run())
