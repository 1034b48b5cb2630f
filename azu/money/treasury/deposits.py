"""Credits deposits from the platform's own ledger on the chain, each hash once, to the chain's sender."""

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from azu.clock import wall_clock_ms
from azu.errors import Conflict, InvalidRequest, TransferConflict
from azu.money.books import Books
from azu.money.chain.port import Chain, LedgerTransfer, TxDetails
from azu.money.chain.rows import (
    LATE_MS,
    MULTI_SIGNATURE,
    arrived,
    balance_of,
    has_no_hash,
    lamports_of,
    left,
    moved_hype,
    namesakes_of,
    row_id,
    same_amount,
)
from azu.money.ledger.transfers import Deposit, Suspended, UnknownOut
from azu.money.treasury.redis import RedisCursor, RedisUncredited, Uncredited
from azu.money.treasury.request_reply import CreditState, DepositStatus
from azu.supervision import AWAY
from azu.units import lamports_from_hype

_LOG = logging.getLogger(__name__)
# How long a row that the explorer does not know holds the cursor. A user can still claim the deposit later.
_GIVE_UP_MS = 3_600_000
# How often callers may have the explorer asked, in all. The chain counts these queries together with those
# for rows that came, which need no caller's question.
_LOOKS, _LOOKS_WITHIN_MS = 900, 3_600_000
_ACTIONS = ("sendAsset", "spotSend")
_SPOT = "spot"


@dataclass(frozen=True, slots=True)
class _Sighting:
    """A row that no action proves: when it was first seen, and that every poll since then has seen it."""

    row: LedgerTransfer
    reason: str
    since_ms: int


class DepositWatcher:
    """Reads the platform's ledgers from a durable cursor on; safe to run twice, to kill and to repeat.

    The ledgers are those of its address and of the `former` ones, where deposits still may arrive.

    A row with a hash is credited at once if its action shows that one sender moved HYPE. What no action
    proves is set aside once it is `settled_ms` old and two polls, some time apart, have shown the same.
    """

    def __init__(
        self,
        chain: Chain,
        ledger: Books,
        cursor: RedisCursor,
        uncredited: RedisUncredited,
        *,
        platform: str,
        former: tuple[str, ...] = (),
        now_ms: Callable[[], int] = wall_clock_ms,
        settled_ms: int = LATE_MS,
    ) -> None:
        self._chain = chain
        self._ledger = ledger
        self._cursor = cursor
        self._uncredited = uncredited
        self._platform = platform
        self._former = former
        self._platforms = (platform, *former)
        self._now_ms = now_ms
        self._settled_ms = settled_ms
        # Rows that need no second check, with the chain's time, for as long as polls go back to that time.
        self._decided: dict[str, int] = {}
        self._unproven: dict[str, _Sighting] = {}
        self._unproven_before: Mapping[str, _Sighting] = {}
        # Addresses that got what no payout says, while a payout to them is open.
        self._unbooked: set[str] = set()
        self._unbooked_before: frozenset[str] = frozenset()
        self._lost = 0
        self._looked_ms: deque[int] = deque()

    def has_left_otherwise(self, address: str) -> bool:
        """Whether a transfer to an address waits for its open payout to be given up, to be booked."""
        return address in self._unbooked_before

    async def poll(self) -> None:
        """Credit every new deposit. Raises ChainError; the next poll continues where this one stopped."""
        if (lost := await self._ledger.loss()) != self._lost:
            # What was decided may be lost.
            self._lost = lost
            self._decided.clear()
        reached = await self._cursor.read()
        start_ms = max(0, reached - LATE_MS)
        self._decided = {row: time_ms for row, time_ms in self._decided.items() if time_ms >= start_ms}
        self._unproven_before, self._unproven = self._unproven, {}
        self._unbooked = set()
        held_ms: int | None = await self._chain.now_ms() if self._former else None
        for platform in self._former:
            async for page in self._chain.ledger_updates(platform, start_ms):
                for row in page:
                    if not await self._try_to_decide(row):
                        held_ms = row.time_ms if held_ms is None else min(held_ms, row.time_ms)
        async for page in self._chain.ledger_updates(self._platform, start_ms):
            for row in page:
                if not await self._try_to_decide(row):
                    held_ms = row.time_ms if held_ms is None else min(held_ms, row.time_ms)
            if page:
                # Only now, with the whole page in the ledger; never past a row that is not decided.
                reached = max(reached, page[-1].time_ms)
                await self._cursor.advance(reached if held_ms is None else min(reached, held_ms))
        self._unbooked_before = frozenset(self._unbooked)
        if self._unproven:
            await self._set_settled_aside()

    async def check(self, tx_hash: str) -> DepositStatus:
        """Return what is known of a hash; a deposit is credited first. Raises ChainError."""
        credited = await self._credited(tx_hash)
        if credited is not None:
            return credited
        if not self._may_look():
            return DepositStatus(CreditState.BUSY)
        details = await self._chain.tx_details(tx_hash)
        if details is None:
            return DepositStatus(CreditState.UNKNOWN)
        status = deposit_status(details, platforms=self._platforms, hype=self._chain.network.hype)
        if status.state is CreditState.REJECTED:
            return status
        # From the transfer's own time on: no poll may go back that far any more. The platform's ledger does
        # not show all rows of a crowded millisecond; the sender's has them too.
        for account in (*self._platforms, status.sender):
            async for page in self._chain.ledger_updates(account, details.time_ms):
                for row in page:
                    if row.hash == tx_hash and row.nth == 0 and await self._decide(row):
                        return await self._credited(tx_hash) or DepositStatus(
                            CreditState.REJECTED, status.sender, reason="the ledger says otherwise"
                        )
        return status

    def _may_look(self) -> bool:
        """Count a caller's question for the explorer; False, without counting, once there were too many."""
        now_ms = self._now_ms()
        while self._looked_ms and self._looked_ms[0] <= now_ms - _LOOKS_WITHIN_MS:
            self._looked_ms.popleft()
        if len(self._looked_ms) >= _LOOKS:
            return False
        self._looked_ms.append(now_ms)
        return True

    async def _credited(self, tx_hash: str) -> DepositStatus | None:
        result = await self._ledger.result(deposit_id(tx_hash))
        if result is None:
            return None
        deposit = result.entry.transfer
        assert isinstance(deposit, Deposit), "the id says so"
        return DepositStatus(CreditState.CREDITED, deposit.address, deposit.lamports)

    async def _is_suspended(self, row: LedgerTransfer) -> bool:
        """Whether a row was booked as suspense: then an admin's command alone credits it."""
        return await self._ledger.result(f"suspended:{row_id(row)}") is not None

    async def _try_to_decide(self, row: LedgerTransfer) -> bool:
        """Decide a row; one that fails for an unknown reason stays undecided, and no other waits for it."""
        try:
            return await self._decide(row)
        except AWAY:
            raise
        except Exception:
            _LOG.exception("not decided: %s", row)
            return False

    async def _decide(self, row: LedgerTransfer) -> bool:
        """Credit, set aside or dismiss a row; return False if that has to wait."""
        name = row_id(row)
        if left(row, self._platforms) and name not in self._decided:
            return await self._book_out(row)
        if not arrived(row, self._platforms) or name in self._decided:
            return True
        if has_no_hash(row):
            return self._sight(row, "it came from HyperEVM, and no action proves its sender")
        if row.nth:
            return self._sight(row, "it is equal to another row of its action")
        is_booked = await self._credited(row.hash) or await self._is_suspended(row)
        if not is_booked and not await self._decide_by_action(row):
            return False
        self._decided[name] = row.time_ms
        return True

    async def _book_out(self, row: LedgerTransfer) -> bool:
        """Book what left the account; the books know whether a payout did it. Return False to wait."""
        name, lamports = row_id(row), lamports_of(row)
        if lamports:
            nonce = row.time_ms if row.nonce is None else row.nonce
            out = UnknownOut(id=f"out:{name}", address=row.destination, lamports=lamports, nonce=nonce)
            try:
                await self._ledger.apply(out)
            except Conflict as error:
                if error.code != "payout_open":
                    raise
                self._unbooked.add(row.destination)
                return False
        self._decided[name] = row.time_ms
        return True

    async def _decide_by_action(self, row: LedgerTransfer) -> bool:
        details = await self._chain.tx_details(row.hash)
        if details is None:
            if self._now_ms() - row.time_ms < _GIVE_UP_MS:
                return False
            return self._sight(row, "the explorer does not know its action")
        hype = self._chain.network.hype
        status = deposit_status(details, platforms=self._platforms, hype=hype)
        if status.state is CreditState.REJECTED:
            match moved_hype(details, hype):
                case True:
                    await self._set_aside(row, status.reason)
                case None:
                    return self._sight(row, status.reason)
                case False:
                    _LOG.warning("no HYPE arrived, %s: %s", status.reason, row)
        elif not agrees(row, status):
            return self._sight(row, f"its action says {status.lamports} of {status.sender}")
        elif status.lamports > 0:
            await self._credit(row, status.lamports)
        return True

    def _sight(self, row: LedgerTransfer, reason: str) -> bool:
        """Remember a row that no action proves; return False, because it has to wait."""
        name = row_id(row)
        known = self._unproven_before.get(name)
        self._unproven[name] = _Sighting(row, reason, known.since_ms if known else self._now_ms())
        return False

    async def _set_settled_aside(self) -> None:
        """Set rows aside that no action proves, that are old enough and were read again.

        Another token may have the same name. A row is HYPE if it is of more than the account holds of such
        tokens; one that another row is equal to has to be in the account beside all that is owed.
        """
        now_ms, namesakes = await self._chain.now_ms(), await namesakes_of(self._chain, self._platforms)
        for name, seen in tuple(self._unproven.items()):
            row = seen.row
            if (
                now_ms - row.time_ms < self._settled_ms
                or self._now_ms() - seen.since_ms < self._read_again_ms
            ):
                continue
            lamports = lamports_of(row)
            if lamports is None or lamports <= namesakes:
                await self._list(row, "it may be of another token with the same name")
            elif row.nth and await self._surplus() < lamports:
                if now_ms - row.time_ms < _GIVE_UP_MS:
                    continue
                _LOG.error("the chain repeats a row: %s", row)
            else:
                await self._set_aside(row, seen.reason)
            self._decided[name] = row.time_ms
            del self._unproven[name]

    @property
    def _read_again_ms(self) -> int:
        return self._settled_ms // 4

    async def _surplus(self) -> int:
        """Return how many lamports the account holds beside all that is owed."""
        held = await balance_of(self._chain, self._platforms)
        return held - await self._ledger.inside()

    async def _set_aside(self, row: LedgerTransfer, reason: str) -> None:
        """Book a transfer that is credited to no account, and list it; an admin may look for its owner."""
        lamports, name = lamports_of(row), row_id(row)
        if lamports:
            suspended = Suspended(
                id=f"suspended:{name}", sender=row.sender, lamports=lamports, row=name, at_ms=row.time_ms
            )
            await self._ledger.apply(suspended)
        await self._list(row, reason)

    async def _list(self, row: LedgerTransfer, reason: str) -> None:
        """List a transfer that is credited to no account."""
        known = (row.time_ms, row.hash, row.sender, row.token_name, row.amount)
        if await self._uncredited.add(Uncredited(*known, reason, row_id(row))):
            _LOG.warning("not credited, %s: %s", reason, row)

    async def _credit(self, row: LedgerTransfer, lamports: int) -> None:
        deposit = Deposit(id=deposit_id(row.hash), address=row.sender, lamports=lamports, at_ms=row.time_ms)
        try:
            await self._ledger.apply(deposit)
        except TransferConflict:
            _LOG.exception("the ledger has another deposit under the hash of %s", row)
            return
        _LOG.info("credited %d lamports to %s: %s", lamports, row.sender, row.hash)


def deposit_id(tx_hash: str) -> str:
    """Return the id of the ledger's transfer for a deposit with this hash."""
    return f"deposit:{tx_hash}"


def deposit_status(details: TxDetails, *, platforms: Collection[str], hype: str) -> DepositStatus:
    """Return PENDING if an action moved HYPE, by its exact token id, to the platform, else REJECTED."""
    action, sender = details.action, details.user
    if details.error is not None:
        reason = f"it failed on the chain: {details.error}"
    elif action.get("type") == MULTI_SIGNATURE:
        reason = "several keys signed it, and its sender cannot log in with one"
    elif action.get("type") not in _ACTIONS:
        reason = "it is no transfer"
    elif _lower(action.get("destination")) not in platforms or action.get("destinationDex", _SPOT) != _SPOT:
        reason = "it was not sent to the platform's spot balance"
    elif action.get("token") != hype:
        reason = f"it moved {action.get('token')}, which is not {hype}"
    elif action.get("fromSubAccount"):
        reason = "it was sent from a sub-account, which has no key to log in with"
    else:
        try:
            return DepositStatus(CreditState.PENDING, sender, lamports_from_hype(str(action.get("amount"))))
        except InvalidRequest:
            reason = "its amount is not a whole number of lamports"
    return DepositStatus(CreditState.REJECTED, sender, reason=reason)


def agrees(row: LedgerTransfer, status: DepositStatus) -> bool:
    """Whether the ledger's row has the same sender and amount as the action."""
    return row.sender == status.sender and same_amount(row.amount, status.lamports)


def _lower(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""
