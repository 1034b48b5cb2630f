"""Credits deposits from the platform's own ledger on the chain, each hash once, to the chain's sender."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any

from azu.clock import wall_clock_ms
from azu.errors import InvalidRequest, TransferConflict
from azu.money.chain.port import Chain, CursorStore, Ledger, LedgerTransfer, TxDetails
from azu.money.ledger.transfers import Deposit
from azu.units import lamports_from_hype

HYPE_NAME = "HYPE"
_ACTIONS = ("sendAsset", "spotSend")
_SPOT = "spot"


class DepositState(StrEnum):
    """PENDING: good, but not in the platform's ledger yet. REJECTED: will never be credited."""

    UNKNOWN = "unknown"
    PENDING = "pending"
    CREDITED = "credited"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class DepositStatus:
    """What the treasury knows of a hash. `sender` is the chain's, empty while the hash is unknown."""

    state: DepositState
    sender: str = ""
    lamports: int = 0
    reason: str = ""


def is_candidate(transfer: LedgerTransfer, platform: str) -> bool:
    """Whether a row of the platform's ledger may be a deposit; its token still has to be checked."""
    arrived = transfer.destination == platform and transfer.sender != platform and transfer.to_spot
    # An all-zero hash marks what no user's action caused: there is nothing to check it against.
    return arrived and transfer.token_name == HYPE_NAME and int(transfer.hash, 16) != 0


def judge(details: TxDetails, *, platform: str, hype: str) -> DepositStatus:
    """Say whether an action moved HYPE, by its exact token id, to the platform: PENDING or REJECTED."""
    action, sender = details.action, details.user
    if details.error is not None:
        reason = f"it failed on the chain: {details.error}"
    elif action.get("type") not in _ACTIONS:
        reason = "it is no transfer"
    elif _lower(action.get("destination")) != platform or action.get("destinationDex", _SPOT) != _SPOT:
        reason = "it was not sent to the platform's spot balance"
    elif action.get("token") != hype:
        reason = f"it moved {action.get('token')}, which is not {hype}"
    elif action.get("fromSubAccount"):
        reason = "it was sent from a sub-account, which has no key to log in with"
    else:
        try:
            return DepositStatus(DepositState.PENDING, sender, lamports_from_hype(str(action.get("amount"))))
        except InvalidRequest:
            reason = "its amount is not a whole number of lamports"
    return DepositStatus(DepositState.REJECTED, sender, reason=reason)


def agrees(row: LedgerTransfer, sighting: DepositStatus) -> bool:
    """Whether the ledger's row says the same as the action: sender and amount."""
    return row.sender == sighting.sender and same_amount(row.amount, sighting.lamports)


def same_amount(amount: str, lamports: int) -> bool:
    """Whether a decimal amount of HYPE is exactly that many lamports."""
    try:
        return Decimal(amount) == Decimal(lamports).scaleb(-8)
    except InvalidOperation:
        return False


def _lower(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""


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

    async def look(self, tx_hash: str) -> DepositStatus:
        """Say what is known of a hash, crediting it first if it is a deposit. Raises ChainError."""
        credited = await self._credited(tx_hash)
        if credited is not None:
            return credited
        details = await self._chain.tx_details(tx_hash)
        if details is None:
            return DepositStatus(DepositState.UNKNOWN)
        sighting = judge(details, platform=self._platform, hype=self._chain.network.hype)
        if sighting.state is DepositState.REJECTED:
            return sighting
        # From its own time on: also one that no poll looks back to any more.
        async for page in self._chain.ledger_updates(self._platform, details.time_ms):
            for row in page:
                if row.hash == tx_hash and await self._decide(row):
                    return await self._credited(tx_hash) or DepositStatus(
                        DepositState.REJECTED, sighting.sender, reason="the ledger says otherwise"
                    )
        return sighting

    async def _credited(self, tx_hash: str) -> DepositStatus | None:
        result = await self._ledger.result(deposit_id(tx_hash))
        if result is None:
            return None
        deposit = result.entry.transfer
        assert isinstance(deposit, Deposit), "the id says so"
        return DepositStatus(DepositState.CREDITED, deposit.address, deposit.lamports)

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
        if sighting.state is DepositState.REJECTED:
            _LOG.warning("not credited, %s: %s", sighting.reason, row)
        elif not agrees(row, sighting):
            _LOG.error("not credited, the explorer says %s: %s", details, row)
        elif sighting.lamports > 0:
            await self._credit(row, sighting.lamports)
        return True

    async def _credit(self, row: LedgerTransfer, lamports: int) -> None:
        deposit = Deposit(id=deposit_id(row.hash), address=row.sender, lamports=lamports)
        try:
            await self._ledger.apply(deposit)
        except TransferConflict:
            _LOG.exception("the ledger has another deposit under the hash of %s", row)
            return
        _LOG.info("credited %d lamports to %s: %s", lamports, row.sender, row.hash)


def deposit_id(tx_hash: str) -> str:
    """Return the id of the ledger's transfer for a deposit with this hash."""
    return f"deposit:{tx_hash}"
