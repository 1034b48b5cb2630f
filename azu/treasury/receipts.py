"""Receipts: how the ingress has the treasury sign them, which signs nothing that the ledger does not say."""

import logging
from typing import Protocol

from eth_account.signers.local import LocalAccount
from redis.asyncio import Redis

from azu.auth.receipts import sign_receipt
from azu.connection import connect_redis
from azu.jobs.record import JobRecord
from azu.ledger.rules import Result
from azu.ledger.transfers import Release, Settle, Transfer
from azu.protocol.job import Receipt
from azu.treasury.questions import RedisQuestions

_LOG = logging.getLogger(__name__)
_TOPIC = "receipts"
_KEPT_MS = 3_600_000
# A job that has not ended, or that the ledger contradicts, may be asked for again after this long.
_REFUSAL_KEPT_MS = 1_000


class Jobs(Protocol):
    """Durable jobs."""

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job's record, or None for an id that was never submitted."""


class Ledger(Protocol):
    """azu's books."""

    async def result(self, transfer_id: str) -> Result | None:
        """Return what a transfer did, None if it never was applied."""


class RedisReceipts:
    """Both ends: the ingress asks for a job's signature, the treasury gives it.

    Every method raises Unavailable when Redis does not answer.
    """

    def __init__(self, redis: Redis) -> None:
        self._questions = RedisQuestions(redis, _TOPIC)

    @classmethod
    def from_url(cls, url: str) -> "RedisReceipts":
        """Return the receipts asked for in the Redis at `url`; connects when first used."""
        return cls(connect_redis(url))

    async def ask(self, job_id: str, timeout_s: float) -> str | None:
        """Return the platform's signature of an ended job's receipt.

        None if the treasury does not answer in `timeout_s`, or does not stand by the receipt.
        """
        async for waited_s, signature in self._questions.asked(job_id):
            if signature is not None or waited_s >= timeout_s:
                return signature or None
        raise AssertionError("it is asked until the timeout")

    async def waiting(self, limit: int) -> list[str]:
        """Return jobs whose receipts are waited for, the oldest question first."""
        return await self._questions.waiting(limit)

    async def answer(self, job_id: str, signature: str) -> None:
        """Answer everybody who waits for a job's signature; empty for none."""
        await self._questions.answer(job_id, signature, _KEPT_MS if signature else _REFUSAL_KEPT_MS)


class ReceiptSigner:
    """Signs the receipts of jobs that the ledger settled as they say."""

    def __init__(self, jobs: Jobs, ledger: Ledger, account: LocalAccount) -> None:
        self._jobs = jobs
        self._ledger = ledger
        self._account = account

    async def sign(self, job_id: str) -> str:
        """Return the signature of a job's receipt, empty if there is none to sign. Raises Unavailable."""
        record = await self._jobs.get(job_id)
        if record is None or record.outcome is None:
            return ""
        receipt = record.outcome.receipt
        result = await self._ledger.result(receipt.transfer_id)
        if result is None or not _booked(result.entry.transfer, receipt):
            _LOG.error("not signed, the ledger has %s for %s", result, receipt, extra={"job_id": job_id})
            return ""
        _LOG.info("signed the receipt", extra={"job_id": job_id})
        return sign_receipt(self._account, receipt)


def _booked(transfer: Transfer, receipt: Receipt) -> bool:
    match transfer:
        case Settle():
            return (transfer.job_id, transfer.charged_lamports, transfer.platform_lamports) == (
                receipt.job_id,
                receipt.charged_lamports,
                receipt.platform_lamports,
            ) and dict(transfer.shares) == dict(receipt.worker_lamports)
        case Release():
            return transfer.job_id == receipt.job_id and receipt.charged_lamports == 0
        case _:
            return False
