"""The treasury signs the receipts that agree with its ledger, and no others."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from eth_account import Account
from redis.asyncio import Redis

from azu.auth.signatures import sealed, verify_receipt
from azu.jobs.redis import RedisJobs
from azu.money.ledger.redis import RedisLedger
from azu.money.treasury.receipts import ReceiptSigner, job_end
from azu.money.treasury.request_reply import ReceiptRequests
from azu.protocol.job import FinishReason, JobOutcome, JobState, Receipt
from azu.redis_client import connect_redis
from tests.builders import OWNERS, job, receipt
from tests.money.ledger import moves
from tests.money.ledger.opened import apply_all

PLATFORM = Account.from_key("0x" + "09" * 32)


@dataclass
class Office:
    ledger: RedisLedger
    jobs: RedisJobs
    receipts: ReceiptRequests

    @classmethod
    def over(cls, redis: Redis) -> "Office":
        return cls(RedisLedger(redis), RedisJobs(redis), ReceiptRequests(redis))

    async def end(self, written: Receipt) -> None:
        """Settle job-1 for 80 lamports and end it with a receipt that may say something else."""
        await apply_all(
            self.ledger,
            moves.deposit(1_000),
            moves.reserve("job-1", 112),
            job_end(receipt()),
        )
        await self.jobs.submit(job())
        await self.jobs.finish("job-1", JobOutcome(JobState.DONE, FinishReason.STOP, written))

    async def sign_all(self) -> None:
        signer = ReceiptSigner(self.jobs.receipt, self.ledger, PLATFORM)
        while True:
            await self.receipts.serve(signer.sign, 10)
            await asyncio.sleep(0.01)


def play(url: str, scenario: Callable[[Office], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        redis = connect_redis(url)
        office = Office.over(redis)
        signing = asyncio.create_task(office.sign_all())
        try:
            await scenario(office)
        finally:
            signing.cancel()
            await redis.aclose()

    asyncio.run(run())


def test_a_settled_jobs_receipt_is_signed(redis_url: str) -> None:
    async def scenario(office: Office) -> None:
        await office.end(receipt())
        signature = await office.receipts.ask("job-1", 5.0)
        platform = PLATFORM.address.lower()
        assert verify_receipt(sealed(receipt(), platform, signature)) == platform

    play(redis_url, scenario)


@pytest.mark.parametrize(
    "written",
    [
        receipt(charged_lamports=79),
        receipt(platform_lamports=80, worker_lamports={}),
        receipt(worker_lamports={OWNERS[0]: 24, OWNERS[1]: 40}),
        receipt(transfer_id="settle:job-2"),
        receipt(transfer_id="deposit:0x01"),
        receipt("job-2", transfer_id="settle:job-1"),
    ],
)
def test_a_receipt_that_the_ledger_contradicts_is_not_signed(redis_url: str, written: Receipt) -> None:
    async def scenario(office: Office) -> None:
        await office.end(written)
        assert await office.receipts.ask("job-1", 5.0) is None

    play(redis_url, scenario)


def test_an_unknown_job_and_an_open_job_have_no_receipt(redis_url: str) -> None:
    async def scenario(office: Office) -> None:
        await office.jobs.submit(job("job-7"))
        assert await office.receipts.ask("job-7", 5.0) is None
        assert await office.receipts.ask("job-8", 5.0) is None

    play(redis_url, scenario)


def test_without_a_treasury_there_is_no_signature(redis_url: str) -> None:
    async def run() -> None:
        redis = connect_redis(redis_url)
        assert await ReceiptRequests(redis).ask("job-1", 0.2) is None
        await redis.aclose()

    asyncio.run(run())
