"""The platform's account as the signer reads it from the chain, over a connection of its own."""

from collections.abc import Iterable, Mapping, Sequence

from azu.money.chain.port import Chain, LedgerTransfer
from azu.money.chain.rows import (
    LATE_MS,
    arrival_of,
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
from azu.money.signer.policy import NONCE_LIFE_MS, SignedTransfer
from azu.money.signer.views import ChainView, Credit, IncomingRow, OutgoingRow

# Of what left the account, rows are kept for longer than a nonce lives.
_OUTGOING_MS = 2 * NONCE_LIFE_MS
# Rows are read again for longer than they may be late: the chain may repeat one by mistake, once.
_AGAIN_MS = 2 * LATE_MS
# A recipient's ledger that does not show a transfer is read again after this time.
_LOOK_AGAIN_MS = 60_000


class PlatformAccount:
    """Rows, balance and clock of the platform's addresses together, its present one first.

    Every method raises ChainError. What moves from one of them to another stays in the account: it is no row
    of it.
    """

    def __init__(self, chain: Chain, platforms: Sequence[str]) -> None:
        self._chain = chain
        self._platforms = platforms
        self._rows: dict[str, LedgerTransfer] = {}
        self._from_ms: int | None = None
        self._reached_ms = 0
        self._excused: set[str] = set()
        # By nonce: what recipients' ledgers show, and when one that does not was read.
        self._arrivals: dict[int, OutgoingRow] = {}
        self._looked_ms: dict[int, int] = {}

    async def view(self, matched_until_ms: int) -> ChainView:
        """Read rows, balance and clock, in this order: what arrived since a time, and what left of late."""
        if not self._reached_ms:
            self._reached_ms = await self._chain.now_ms()
        since_ms = max(0, min(matched_until_ms, self._reached_ms - _OUTGOING_MS))
        await self._read(since_ms)
        balance = await balance_of(self._chain, self._platforms)
        self._reached_ms = await self._chain.now_ms()
        rows = sorted(self._rows.values(), key=lambda row: row.time_ms)
        return ChainView(
            self._reached_ms,
            balance,
            tuple(went for row in rows if (went := self._outgoing(row)) is not None),
            tuple(came for row in rows if (came := self._incoming(row)) is not None),
        )

    async def shown(self, credits_: Iterable[Credit]) -> frozenset[str]:
        """Return the rows of credits that their senders' ledgers show.

        The platform's own ledger does not show all rows of a crowded millisecond.
        """
        return frozenset([credit.row for credit in credits_ if await self._is_sent(credit)])

    async def arrivals(self, signed: Mapping[int, SignedTransfer]) -> tuple[OutgoingRow, ...]:
        """Return the transfers, of those signed under these nonces, that their recipients' ledgers show."""
        self._arrivals = {nonce: row for nonce, row in self._arrivals.items() if nonce in signed}
        self._looked_ms = {nonce: at_ms for nonce, at_ms in self._looked_ms.items() if nonce in signed}
        for nonce, one in signed.items():
            looked_ms = self._looked_ms.get(nonce, -_LOOK_AGAIN_MS)
            if nonce in self._arrivals or self._reached_ms < looked_ms + _LOOK_AGAIN_MS:
                continue
            row = await arrival_of(
                self._chain, self._platforms, recipient=one.address, lamports=one.lamports, nonce=nonce
            )
            if row is None:
                self._looked_ms[nonce] = self._reached_ms
            else:
                self._arrivals[nonce] = OutgoingRow(row.time_ms, nonce, one.address, one.lamports)
        return tuple(self._arrivals.values())

    async def excused(self, rows: Iterable[IncomingRow], surplus: int) -> frozenset[str]:
        """Return the rows that the treasury credits nothing for, by its own rules.

        They are of another token with the same name, or repeat another row; `surplus` is what the account
        holds beside all that is owed.
        """
        waiting = [row for row in rows if row.row not in self._excused]
        if waiting:
            namesakes = await namesakes_of(self._chain, self._platforms)
            for row in waiting:
                if await self._is_excused(row, namesakes, surplus):
                    self._excused.add(row.row)
        return frozenset(self._excused)

    async def _read(self, since_ms: int) -> None:
        is_known = self._from_ms is not None and self._from_ms <= since_ms
        start_ms = max(since_ms, self._reached_ms - _AGAIN_MS) if is_known else since_ms
        read = {
            row_id(row): row
            for platform in self._platforms
            async for page in self._chain.ledger_updates(platform, start_ms)
            for row in page
        }
        self._rows = {
            name: row for name, row in self._rows.items() if since_ms <= row.time_ms < start_ms
        } | read
        self._from_ms = since_ms
        self._excused &= self._rows.keys()

    def _outgoing(self, row: LedgerTransfer) -> OutgoingRow | None:
        lamports = lamports_of(row) if left(row, self._platforms) else None
        is_former = row.sender != self._platforms[0]
        return OutgoingRow(row.time_ms, row.nonce, row.destination, lamports, is_former) if lamports else None

    def _incoming(self, row: LedgerTransfer) -> IncomingRow | None:
        lamports = lamports_of(row) if arrived(row, self._platforms) else None
        if not lamports:
            return None
        tx_hash = "" if has_no_hash(row) else row.hash
        return IncomingRow(row_id(row), tx_hash, row.sender, lamports, row.time_ms)

    async def _is_sent(self, credit: Credit) -> bool:
        async for page in self._chain.ledger_updates(credit.sender, credit.at_ms):
            for row in page:
                if row.time_ms > credit.at_ms:
                    return False
                is_it = credit.row in (row.hash, row_id(row)) and same_amount(row.amount, credit.lamports)
                if is_it and row.sender == credit.sender and arrived(row, self._platforms):
                    return True
        return False

    async def _is_excused(self, row: IncomingRow, namesakes: int, surplus: int) -> bool:
        is_repeated = self._rows[row.row].nth > 0
        if row.hash and not is_repeated:
            details = await self._chain.tx_details(row.hash)
            if details is not None and moved_hype(details, self._chain.network.hype) is not None:
                return moved_hype(details, self._chain.network.hype) is False
        return row.lamports <= namesakes or (is_repeated and surplus < row.lamports)
