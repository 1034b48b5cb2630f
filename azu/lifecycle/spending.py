"""Keeps a key within its spend limit, by what the ledger says of the key's jobs."""

from collections.abc import Sequence
from typing import Protocol

from azu.auth.keys import ApiKey
from azu.auth.spending import Taken
from azu.errors import InsufficientBalance, Unauthenticated
from azu.ledger.holds import Reservation
from azu.ledger.rules import Result
from azu.ledger.transfers import Settle

# Longer than any ingress takes from here to the reservation.
_LOST_AFTER_MS = 600_000


class Spending(Protocol):
    """What is counted against limits."""

    async def take(self, key_id: str, taken: Taken, limit_lamports: int) -> bool:
        """Count a job against its key; False if that exceeded the limit."""

    async def open(self, key_id: str) -> Sequence[Taken]:
        """Return the jobs that were taken and not ended."""

    async def end(self, key_id: str, job_id: str, charged_lamports: int) -> None:
        """Count what a job was charged in place of what it might have been."""


class Books(Protocol):
    """The ledger."""

    async def reservation(self, job_id: str) -> Reservation | None:
        """Return a job's reservation, open or ended; None if there was never one."""

    async def result(self, transfer_id: str) -> Result | None:
        """Return what a transfer did."""


class SpendLimits:
    """Counts before the reservation and corrects from the ledger: what a key may spend is never exceeded."""

    def __init__(self, spending: Spending, books: Books) -> None:
        self._spending = spending
        self._books = books

    async def take(self, key: ApiKey, job_id: str, lamports: int, now_ms: int) -> None:
        """Count the highest price of a job against its key.

        Raises Unauthenticated for a key that has ended, InsufficientBalance (`spend_limit_reached`) if the
        key's other jobs and this one might be charged more than its limit.
        """
        if key.expires_at_ms is not None and key.expires_at_ms <= now_ms:
            raise Unauthenticated("this API key has expired; `azu login` opens another")
        if (limit := key.spend_limit_lamports) is None:
            return
        taken = Taken(job_id, lamports, now_ms)
        if await self._spending.take(key.key_id, taken, limit):
            return
        await self.correct(key, now_ms)
        if not await self._spending.take(key.key_id, taken, limit):
            raise InsufficientBalance(
                f"this may take {lamports} lamports; the key's limit of {limit} does not bear it",
                code="spend_limit_reached",
            )

    async def correct(self, key: ApiKey, now_ms: int) -> None:
        """Count jobs that have ended by what they were charged."""
        for taken in await self._spending.open(key.key_id):
            charged = await self._charged(taken, now_ms)
            if charged is not None:
                await self._spending.end(key.key_id, taken.job_id, charged)

    async def give_back(self, key: ApiKey, job_id: str) -> None:
        """Count nothing for a job for which nothing was reserved."""
        if key.spend_limit_lamports is not None:
            await self._spending.end(key.key_id, job_id, 0)

    async def _charged(self, taken: Taken, now_ms: int) -> int | None:
        """Return what a job was charged, None while that is open."""
        reservation = await self._books.reservation(taken.job_id)
        if reservation is None:
            return 0 if now_ms - taken.at_ms > _LOST_AFTER_MS else None
        if reservation.ended_by is None:
            return None
        result = await self._books.result(reservation.ended_by)
        assert result is not None, "the ledger has every transfer that ended something"
        transfer = result.entry.transfer
        return transfer.charged_lamports if isinstance(transfer, Settle) else 0
