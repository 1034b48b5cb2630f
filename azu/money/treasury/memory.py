"""What the treasury remembers in a file of its own: it signs nothing while Redis knows less than that."""

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.errors import ConfigurationError, Unavailable
from azu.files import replacing, write_all
from azu.money.ledger.losses import Loss, Mark
from azu.money.ledger.redis import RedisLedger
from azu.money.treasury.redis import RedisOutbox

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Remembered:
    __pydantic_config__ = ConfigDict(extra="forbid")

    journal: Mark = field(default_factory=Mark)
    payout_writes: int = 0


_REMEMBERED = TypeAdapter(_Remembered)


class Memory:
    """The last entry of the journal, and the number of payouts' states, that the treasury was answered.

    Raises ConfigurationError for a file that cannot be read. Without a path nothing outlives the process.
    """

    def __init__(self, path: Path | None, ledger: RedisLedger, outbox: RedisOutbox) -> None:
        self._path = path
        self._losses = ledger.losses
        self._outbox = outbox
        self._open: Loss | None = None
        self._looking = asyncio.Lock()
        kept = _read(path) if path is not None and path.exists() else _Remembered()
        self._losses.mark, self._outbox.writes = kept.journal, kept.payout_writes

    async def may_sign(self) -> bool:
        """Say whether Redis has all that it answered; a loss that the admin accepted counts no more.

        Raises Unavailable while Redis is away.
        """
        # A second call would find a loss settled before the first has taken note, and write it again.
        async with self._looking:
            await self._outbox.look()
            if self._outbox.lost:
                await self._losses.note(Mark(), payout_writes=self._outbox.lost)
            loss = await self._losses.look()
            if loss is None and self._open is not None:
                # Redis lost its own note of the loss.
                await self._losses.note(
                    Mark(), entries=self._open.entries, payout_writes=self._open.payout_writes
                )
                loss = await self._losses.open_loss()
            if loss is not None and loss.is_accepted:
                await self._outbox.forget()
                await self._losses.settle()
                self._open = None
                self.keep()
                _LOG.warning("%s, which was accepted: payouts and receipts are signed again", loss)
                return True
            if loss != self._open:
                _LOG.error("%s: nothing is signed until `azu treasury accept-loss`", loss)
                self._open = loss
            return loss is None

    def keep(self) -> None:
        """Write what was answered so far to the file; raises Unavailable if Redis went back meanwhile."""
        if self._losses.has_noted or self._outbox.lost:
            raise Unavailable("the ledger went back: nothing is signed until the loss is accepted")
        if self._path is None:
            return
        with replacing(self._path) as file:
            write_all(file, _REMEMBERED.dump_json(_Remembered(self._losses.mark, self._outbox.writes)))


def _read(path: Path) -> _Remembered:
    try:
        return _REMEMBERED.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigurationError(
            f"{path} cannot be read; it says how far the ledger was, so that payouts are not signed twice: "
            "move it away only after `azu ledger audit` agrees with the chain"
        ) from error
