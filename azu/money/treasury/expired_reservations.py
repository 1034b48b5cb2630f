"""Returns the reservations of lost jobs to their users."""

import logging
from collections.abc import Awaitable, Callable

from azu.clock import wall_clock_ms
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.transfers import Expire

_LOG = logging.getLogger(__name__)


class ReservationExpiry:
    """Expires the reservations of jobs that were never written, because the process that reserved died first.

    A job that was written keeps its reservation, however old, until its end is settled: a scheduler takes the
    job again. `give_up` marks a job as lost; it returns False if the job was written.
    """

    def __init__(
        self,
        ledger: RedisLedger,
        give_up: Callable[[str], Awaitable[bool]],
        *,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._ledger = ledger
        self._give_up = give_up
        self._now_ms = now_ms

    async def sweep(self) -> None:
        """Expire what is overdue. Raises Unavailable; sweeping twice changes nothing."""
        for reservation in await self._ledger.expired(self._now_ms()):
            # First the job, then its money: a job that is written meanwhile keeps its reservation.
            if await self._give_up(reservation.job_id):
                await self._ledger.apply(Expire(id=f"expire:{reservation.job_id}", job_id=reservation.job_id))
                ids = {"job_id": reservation.job_id}
                _LOG.warning("gave back what was reserved for a lost job: %s", reservation, extra=ids)
