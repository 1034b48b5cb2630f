"""Receipts: how the ingress has the treasury sign them, which signs nothing that the ledger does not say."""

import logging
from typing import Protocol

from eth_account.signers.local import LocalAccount

from azu.auth.signatures import sign_receipt
from azu.jobs.record import JobRecord
from azu.money.ledger.rules import Result
from azu.money.ledger.transfers import Release, Settle, Transfer
from azu.protocol.job import Receipt

_LOG = logging.getLogger(__name__)


class JobRecords(Protocol):
    """Durable jobs."""

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job's record, or None for an id that was never submitted."""


class Ledger(Protocol):
    """azu's books."""

    async def result(self, transfer_id: str) -> Result | None:
        """Return what a transfer did, None if it never was applied."""


class ReceiptSigner:
    """Signs the receipts of jobs that the ledger settled as they say."""

    def __init__(self, jobs: JobRecords, ledger: Ledger, account: LocalAccount) -> None:
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
