"""A payer disputes a job over HTTP, before what it paid out has matured."""

import asyncio
from pathlib import Path

from eth_account import Account

from azu.auth.signatures import sign_dispute
from azu.money.ledger.transfers import Deposit
from azu.units import LAMPORTS_PER_HYPE
from tests.deployments.local import PLATFORM, local_ingress

ASKED = {"model": "azu/tiny-dense", "prompt": "Hello", "max_tokens": 2}


def test_a_job_is_disputed_by_its_payer_alone_and_the_answer_stays(redis_url: str, tmp_path: Path) -> None:
    async def ask() -> None:
        async with local_ingress(redis_url, tmp_path, maturity_ms=60_000) as ingress:
            payer = Account.create()
            address, lamports = payer.address.lower(), LAMPORTS_PER_HYPE
            await ingress.books.bookkeeper.apply(
                Deposit(id="deposit:0x1", address=address, lamports=lamports, at_ms=1)
            )
            api_key = await ingress.open_key(payer)
            _, others_key = await ingress.user()
            async with ingress.client(api_key) as client, ingress.client(others_key) as other:
                job_id = (await client.post("/v1/completions", json=ASKED)).json()["azu"]["job_id"]
                receipt = (await client.get(f"/v1/receipts/{job_id}")).json()
                path, body = (
                    f"/v1/jobs/{job_id}/dispute",
                    {"signature": sign_dispute(payer, job_id, PLATFORM)},
                )

                before = await client.get(path)
                unsigned = await client.post(path, json={"signature": "0x" + "1b" * 65})
                of_another = await other.post(path, json=body)
                held, again = [await client.post(path, json=body) for _ in range(2)]
                read, by_another = await client.get(path), await other.get(path)

            assert (unsigned.status_code, of_another.status_code) == (403, 404)
            assert of_another.json()["error"]["code"] == "job_not_found"
            assert held.json() == again.json()
            charged = receipt["charged_lamports"]
            expected = {"job_id": job_id, "held_lamports": charged, "state": "held", "returned_lamports": 0}
            assert held.json() == read.json() == expected
            assert before.json() == expected | {"held_lamports": 0, "state": "none"}
            assert by_another.status_code == 403
            assert receipt["charged_lamports"] > 0

    asyncio.run(asyncio.wait_for(ask(), 300))


def test_a_job_that_has_matured_is_not_disputed(redis_url: str, tmp_path: Path) -> None:
    async def ask() -> None:
        async with local_ingress(redis_url, tmp_path) as ingress:
            payer = Account.create()
            funded = Deposit(
                id="deposit:0x1", address=payer.address.lower(), lamports=LAMPORTS_PER_HYPE, at_ms=1
            )
            await ingress.books.bookkeeper.apply(funded)
            async with ingress.client(await ingress.open_key(payer)) as client:
                job_id = (await client.post("/v1/completions", json=ASKED)).json()["azu"]["job_id"]
                body = {"signature": sign_dispute(payer, job_id, PLATFORM)}
                late = await client.post(f"/v1/jobs/{job_id}/dispute", json=body)
            assert (late.status_code, late.json()["error"]["code"]) == (409, "matured")

    asyncio.run(asyncio.wait_for(ask(), 300))
