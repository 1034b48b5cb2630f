"""Receipts: what the ledger has to say of an ended job, and the platform's signature when it does."""

import logging
from collections.abc import Awaitable, Callable

from eth_account.signers.local import LocalAccount

from azu.auth.signatures import sign_receipt
from azu.errors import LedgerError
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.transfers import Release, Settle, Transfer
from azu.protocol.job import Receipt

_LOG = logging.getLogger(__name__)


def job_end(receipt: Receipt) -> Settle | Release:
    """Return the transfer that ends a job as its receipt says; raises LedgerError if its sums are wrong."""
    if not receipt.charged_lamports:
        return Release(id=receipt.transfer_id, job_id=receipt.job_id)
    return Settle(
        id=receipt.transfer_id,
        job_id=receipt.job_id,
        charged_lamports=receipt.charged_lamports,
        platform_lamports=_kept(receipt),
        shares=receipt.worker_lamports,
    )


def _kept(receipt: Receipt) -> int:
    """Return what stays with azu of a charge: what is held has no account of its own yet."""
    return receipt.platform_lamports + receipt.held_lamports


class ReceiptSigner:
    """Signs the receipts of jobs that the ledger ended as the receipts say.

    `receipt_of` returns the receipt of an ended job, None for every other id.
    """

    def __init__(
        self,
        receipt_of: Callable[[str], Awaitable[Receipt | None]],
        ledger: RedisLedger,
        account: LocalAccount,
    ) -> None:
        self._receipt_of = receipt_of
        self._ledger = ledger
        self._account = account

    async def sign(self, job_id: str) -> str:
        """Return the signature of a job's receipt, empty if there is none to sign. Raises Unavailable."""
        receipt = await self._receipt_of(job_id)
        if receipt is None:
            return ""
        result = await self._ledger.result(receipt.transfer_id)
        if result is None or not _is_booked(result.entry.transfer, receipt):
            _LOG.error("not signed, the ledger has %s for %s", result, receipt, extra={"job_id": job_id})
            return ""
        _LOG.info("signed the receipt", extra={"job_id": job_id})
        return sign_receipt(self._account, receipt)


def _is_booked(transfer: Transfer, receipt: Receipt) -> bool:
    try:
        return transfer == job_end(receipt)
    except LedgerError:
        return False
