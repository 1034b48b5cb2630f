"""Receipts: the platform's signature of what the books say of an ended job."""

import logging

from eth_account.signers.local import LocalAccount

from azu.auth.signatures import sign_receipt
from azu.money.books import Books

_LOG = logging.getLogger(__name__)


class ReceiptSigner:
    """Signs the receipts of jobs that have ended, as the books made them from their entries."""

    def __init__(self, ledger: Books, account: LocalAccount) -> None:
        self._ledger = ledger
        self._account = account

    async def sign(self, job_id: str) -> str:
        """Return the signature of a job's receipt, empty for a job that has not ended. Raises Unavailable."""
        outcome = await self._ledger.ended(job_id)
        if outcome is None:
            return ""
        _LOG.info("signed the receipt", extra={"job_id": job_id})
        return sign_receipt(self._account, outcome.receipt)
