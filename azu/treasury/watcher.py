"""Credits deposits from the platform's own ledger on the chain, each hash once, to the chain's sender."""

import logging
from collections.abc import Callable

from azu.chain.replies import LedgerTransfer
from azu.errors import TransferConflict
from azu.ledger.transfers import Deposit
from azu.treasury.clock import wall_clock_ms
from azu.treasury.deposits import Sighting, SightingState, agrees, is_candidate, judge
from azu.treasury.ports import Chain, CursorStore, Ledger

_LOG = logging.getLogger(__name__)
# Rows may appear late, with their own time: every look goes back this far behind the cursor.
OVERLAP_MS = 120_000
# How long a row without an entry in the explorer holds the cursor; a claim can still bring it up later.
_GIVE_UP_MS = 3_600_000


class DepositWatcher:
    """Reads the platform's ledger from a durable cursor on; safe to run twice, to kill and to repeat."""

    def __init__(
        self,
        chain: Chain,
        ledger: Ledger,
        cursor: CursorStore,
        *,
        platform: str,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._chain = chain
        self._ledger = ledger
        self._cursor = cursor
        self._platform = platform
        self._now_ms = now_ms
        # Hashes that need no second look, with the chain's time, for as long as looks go back to them.
        self._decided: dict[str, int] = {}

    async def poll(self) -> None:
        """Credit everything that is new. Raises ChainError; the next poll goes on where this one stopped."""
        reached = await self._cursor.read()
        start_ms = max(0, reached - OVERLAP_MS)
        self._decided = {tx: time_ms for tx, time_ms in self._decided.items() if time_ms >= start_ms}
        held_ms: int | None = None
        async for page in self._chain.ledger_updates(self._platform, start_ms):
            for row in page:
                if not await self._decide(row):
                    held_ms = row.time_ms if held_ms is None else min(held_ms, row.time_ms)
            if page:
                # Only now, with the whole page in the ledger; never past a row that is not decided.
                reached = max(reached, page[-1].time_ms)
                await self._cursor.advance(reached if held_ms is None else min(reached, held_ms))

    async def look(self, tx_hash: str) -> Sighting:
        """Say what is known of a hash, crediting it first if it is a deposit. Raises ChainError."""
        credited = await self._credited(tx_hash)
        if credited is not None:
            return credited
        details = await self._chain.tx_details(tx_hash)
        if details is None:
            return Sighting(SightingState.UNKNOWN)
        sighting = judge(details, platform=self._platform, hype=self._chain.network.hype)
        if sighting.state is SightingState.REJECTED:
            return sighting
        # From its own time on: also one that no poll looks back to any more.
        async for page in self._chain.ledger_updates(self._platform, details.time_ms):
            for row in page:
                if row.hash == tx_hash and await self._decide(row):
                    return await self._credited(tx_hash) or Sighting(
                        SightingState.REJECTED, sighting.sender, reason="the ledger says otherwise"
                    )
        return sighting

    async def _credited(self, tx_hash: str) -> Sighting | None:
        result = await self._ledger.result(_deposit_id(tx_hash))
        if result is None:
            return None
        deposit = result.entry.transfer
        assert isinstance(deposit, Deposit), "the id says so"
        return Sighting(SightingState.CREDITED, deposit.address, deposit.lamports)

    async def _decide(self, row: LedgerTransfer) -> bool:
        """Credit or dismiss a row; False if the chain does not say enough yet."""
        if row.hash in self._decided or not is_candidate(row, self._platform):
            return True
        decided = await self._credited(row.hash) is not None or await self._judge_row(row)
        if decided:
            self._decided[row.hash] = row.time_ms
        return decided

    async def _judge_row(self, row: LedgerTransfer) -> bool:
        details = await self._chain.tx_details(row.hash)
        if details is None:
            if self._now_ms() - row.time_ms < _GIVE_UP_MS:
                return False
            _LOG.error("not credited: the explorer does not know %s", row)
            return True
        sighting = judge(details, platform=self._platform, hype=self._chain.network.hype)
        if sighting.state is SightingState.REJECTED:
            _LOG.warning("not credited, %s: %s", sighting.reason, row)
        elif not agrees(row, sighting):
            _LOG.error("not credited, the explorer says %s: %s", details, row)
        elif sighting.lamports > 0:
            await self._credit(row, sighting.lamports)
        return True

    async def _credit(self, row: LedgerTransfer, lamports: int) -> None:
        deposit = Deposit(id=_deposit_id(row.hash), address=row.sender, lamports=lamports)
        try:
            await self._ledger.apply(deposit)
        except TransferConflict:
            _LOG.exception("the ledger has another deposit under the hash of %s", row)
            return
        _LOG.info("credited %d lamports to %s: %s", lamports, row.sender, row.hash)


def _deposit_id(tx_hash: str) -> str:
    return f"deposit:{tx_hash}"
