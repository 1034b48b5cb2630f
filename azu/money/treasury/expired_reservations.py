"""Gives back what was reserved for jobs that never came to be."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from azu.clock import wall_clock_ms
from azu.money.ledger.rules import Reservation
from azu.money.ledger.transfers import Expire, Transfer

_LOG = logging.getLogger(__name__)


class Reservations(Protocol):
    """The ledger's open reservations."""

    async def expired(self, now_ms: int) -> Sequence[Reservation]:
        """Return the open reservations whose time has come."""

    async def apply(self, transfer: Transfer) -> object:
        """Apply a transfer once."""


class JobRecords(Protocol):
    """Durable jobs."""

    async def give_up(self, job_id: str) -> bool:
        """Give up a job for lost; False if it was written down, else it never will be."""


class ReservationExpiry:
    """Expires reservations of lost jobs: whoever reserved died before the job was written down.

    A job that is written down lives until its end is settled, however long its reservation is overdue:
    somebody takes it again.
    """

    def __init__(
        self, ledger: Reservations, jobs: JobRecords, *, now_ms: Callable[[], int] = wall_clock_ms
    ) -> None:
        self._ledger = ledger
        self._jobs = jobs
        self._now_ms = now_ms

    async def sweep(self) -> None:
        """Expire what is overdue. Raises Unavailable; sweeping twice changes nothing."""
        for reservation in await self._ledger.expired(self._now_ms()):
            # First the job, then its money: one that is written down meanwhile keeps its reservation.
            if await self._jobs.give_up(reservation.job_id):
                await self._ledger.apply(Expire(id=f"expire:{reservation.job_id}", job_id=reservation.job_id))
                ids = {"job_id": reservation.job_id}
                _LOG.warning("gave back what was reserved for a lost job: %s", reservation, extra=ids)
