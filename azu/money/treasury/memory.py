"""What the treasury remembers in a file of its own: it signs nothing while Redis knows less than that."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from azu.errors import ConfigurationError, LedgerError, Unavailable
from azu.files import replacing, write_all
from azu.money.books import Books
from azu.money.treasury.redis import RedisOutbox

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Remembered:
    payout_writes: int = 0


_REMEMBERED = TypeAdapter(_Remembered)


class Memory:
    """The number of payouts' states that the treasury was answered; the books remember their journal.

    Raises ConfigurationError for a file that cannot be read. Without a path nothing outlives the process.
    """

    def __init__(self, path: Path | None, ledger: Books, outbox: RedisOutbox) -> None:
        self._path = path
        self._ledger = ledger
        self._outbox = outbox
        self._has_told = False
        self._why_not = ""
        self._looking = asyncio.Lock()
        kept = _read(path) if path is not None and path.exists() else _Remembered()
        self._outbox.writes = kept.payout_writes

    async def may_sign(self) -> bool:
        """Say whether books and payouts have all that was answered; a loss that the admin accepted is over.

        Raises Unavailable while the books or Redis are away.
        """
        async with self._looking:
            await self._outbox.look()
            try:
                lost = await self._ledger.loss()
            except LedgerError as error:
                return self._may_not(error.message)
            if self._outbox.lost and not lost and not self._has_told:
                lost = self._outbox.lost
                await self._ledger.note_loss(lost)
            self._has_told = bool(lost)
            if lost:
                return self._may_not(f"the ledger went back by {lost}")
            if self._outbox.lost:
                await self._outbox.forget()
                self.keep()
            if self._why_not:
                _LOG.warning("payouts and receipts are signed again")
            self._why_not = ""
            return True

    def _may_not(self, why: str) -> bool:
        if why != self._why_not:
            _LOG.error("%s: nothing is signed until an admin has looked", why)
        self._why_not = why
        return False

    def keep(self) -> None:
        """Write what was answered so far to the file; raises Unavailable if Redis went back meanwhile."""
        if self._outbox.lost:
            raise Unavailable("payouts went back: nothing is signed until the loss is accepted")
        if self._path is None:
            return
        with replacing(self._path) as file:
            write_all(file, _REMEMBERED.dump_json(_Remembered(self._outbox.writes)))


def _read(path: Path) -> _Remembered:
    try:
        return _REMEMBERED.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigurationError(
            f"{path} cannot be read; it says how far the ledger was, so that payouts are not signed twice: "
            "move it away only after `azu ledger audit` agrees with the chain"
        ) from error
