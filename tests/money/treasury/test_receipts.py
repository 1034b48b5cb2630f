"""The treasury signs the receipts of jobs that the books have ended, and no others."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from eth_account import Account
from redis.asyncio import Redis

from azu.auth.signatures import sealed, verify_receipt
from azu.money.books import Books
from azu.money.treasury.receipts import ReceiptSigner
from azu.money.treasury.request_reply import ReceiptRequests
from azu.redis_client import connect_redis
from tests.builders import OWNERS
from tests.money.ledger import moves
from tests.money.serving import ServedBooks, serving

PLATFORM = Account.from_key("0x" + "09" * 32)


@dataclass
class Office:
    served: ServedBooks
    books: Books
    receipts: ReceiptRequests

    async def reserve(self, job_id: str) -> None:
        core = await self.served.bookkeeper.ledger()
        for transfer in (moves.open_key(), moves.deposit(1_000), moves.reserve(job_id, 112)):
            await core.apply(transfer)

    async def sign_all(self) -> None:
        signer = ReceiptSigner(self.books, PLATFORM)
        while True:
            await self.receipts.serve(signer.sign, 10)
            await asyncio.sleep(0.01)


def play(url: str, scenario: Callable[[Office], Coroutine[Any, Any, None]]) -> None:
    async def run(redis: Redis) -> None:
        async with serving(url) as served:
            office = Office(served, served.client("treasury"), ReceiptRequests(redis))
            signing = asyncio.create_task(office.sign_all())
            try:
                await scenario(office)
            finally:
                signing.cancel()
                await office.books.close()
                await redis.aclose()

    asyncio.run(run(connect_redis(url)))


def test_the_receipt_of_a_settled_job_is_signed(redis_url: str) -> None:
    async def scenario(office: Office) -> None:
        await office.reserve("job-1")
        await (await office.served.bookkeeper.ledger()).apply(moves.settle("job-1", 80, w0=40, w1=24))

        signature = await office.receipts.ask("job-1", 5.0)

        outcome = await office.books.ended("job-1")
        assert outcome is not None
        assert outcome.receipt.worker_lamports == {OWNERS[0]: 40, OWNERS[1]: 24}
        platform = PLATFORM.address.lower()
        assert verify_receipt(sealed(outcome.receipt, platform, signature)) == platform

    play(redis_url, scenario)


def test_an_unknown_job_and_an_open_job_have_no_receipt(redis_url: str) -> None:
    async def scenario(office: Office) -> None:
        await office.reserve("job-7")
        assert await office.receipts.ask("job-7", 5.0) is None
        assert await office.receipts.ask("job-8", 5.0) is None

    play(redis_url, scenario)


def test_without_a_treasury_there_is_no_signature(redis_url: str) -> None:
    async def run() -> None:
        redis = connect_redis(redis_url)
        assert await ReceiptRequests(redis).ask("job-1", 0.2) is None
        await redis.aclose()

    asyncio.run(run())
