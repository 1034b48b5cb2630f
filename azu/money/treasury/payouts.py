"""Pays workers and users: advances each payout until the chain's ledger decides it."""

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from azu.clock import wall_clock_ms
from azu.errors import (
    ChainError,
    Conflict,
    Forbidden,
    InsufficientBalance,
    InvalidRequest,
    LedgerError,
    RateLimited,
    Unavailable,
)
from azu.money.books import Books
from azu.money.chain.port import Chain, LedgerTransfer
from azu.money.chain.rows import NONCE_WINDOW_MS, arrival_of, balance_of, same_amount
from azu.money.ledger.transfers import PayoutPlanned, RevenueTaken, WithdrawalPlanned
from azu.money.signer.calls import SignerCalls
from azu.money.signer.policy import nonce_for
from azu.money.signer.views import OpenPayout, PayoutKind
from azu.money.treasury.outbox import Payout, PayoutState
from azu.money.treasury.planning import AmountOwed
from azu.money.treasury.redis import RedisOutbox
from azu.money.treasury.withdrawals import RedisWithdrawals

_LOG = logging.getLogger(__name__)
# The chain accepts a nonce for two days; the third allows for a wrong clock.
_NONCE_LIFE_MS = 3 * 86_400_000
# How long after a look at what the chain does not show the next one is due.
_LOOK_AGAIN_MS = 60_000
# So many nonces are tried for a payout at once: an address is rarely paid as often within their window.
_MOST_PLACES = 16
# So many payouts get a nonce of one window: of more, one could be below the hundred highest, and be refused.
_MOST_OF_WINDOW = 90
_LEFT_OTHERWISE = "a transfer to its address left the account that the books did not know"
# States in which the chain's ledger may show the payout.
_AWAITING = (PayoutState.SENT, PayoutState.ACCEPTED, PayoutState.ABANDONED)


@dataclass(frozen=True, slots=True)
class PayoutTimeouts:
    """How long the payer waits for the chain.

    A refused post is repeated up to `max_attempts` times, a post without an answer for `give_up_ms`, well
    within the two days for which a nonce is valid. The chain's ledger decides an abandoned payout
    `conclude_ms` after its nonce was used up, which is longer than any of its rows ever came late.
    """

    max_attempts: int = 5
    give_up_ms: int = 12 * 3_600_000
    conclude_ms: int = 600_000


class Superseded(Exception):
    """Another process has advanced the payout since it was read."""


class Payer:
    """Advances payouts, one step at a time; safe to kill anywhere and to run twice.

    A payout that was not sent is given up where `gives_up` says so of its address.
    """

    def __init__(
        self,
        chain: Chain,
        ledger: Books,
        outbox: RedisOutbox,
        withdrawals: RedisWithdrawals,
        signer: SignerCalls,
        timeouts: PayoutTimeouts,
        *,
        platforms: tuple[str, ...],
        on_refused: Callable[[str], None],
        gives_up: Callable[[str], bool] = lambda _: False,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._chain = chain
        self._ledger = ledger
        self._outbox = outbox
        self._signer = signer
        self._platforms = platforms
        self._timeouts = timeouts
        self._on_refused = on_refused
        self._gives_up = gives_up
        self._withdrawals = withdrawals
        self._now_ms = now_ms
        # When payouts that no ledger of the chain shows are looked for again.
        self._overdue: dict[str, int] = {}
        # Why a payout is not signed now, as it was logged.
        self._unsigned: dict[str, str] = {}
        # The payouts that had a nonce of the last window.
        self._window = 0
        self._numbered_in_window: set[str] = set()

    async def plan(self, owed: Sequence[AmountOwed], since_ms: int) -> None:
        """Write a payout for each amount; an address with an open payout is left out.

        `since_ms` is a time of the chain that is not in the chain's future.
        """
        for amount in owed:
            payout = Payout(
                payout_id=f"payout:{amount.address}:{secrets.token_hex(12)}",
                address=amount.address,
                lamports=amount.lamports,
                planned_at_ms=self._now_ms(),
                since_ms=since_ms,
            )
            if await self._outbox.add(payout):
                _LOG.info("planned %s of %d lamports", payout.payout_id, payout.lamports)

    async def resume(self, set_aside: Sequence[OpenPayout]) -> None:
        """Take up payouts that the books have set money aside for and the outbox does not have.

        These are revenue that an admin takes, and what the outbox lost.
        """
        busy = {payout.address for payout in await self._outbox.open()}
        for payout in set_aside:
            if payout.address not in busy and await self._outbox.add(Payout.of_books(payout)):
                _LOG.info("took up %s of %d lamports", payout.payout_id, payout.lamports)
                busy.add(payout.address)

    async def advance(self) -> None:
        """Take every open payout as far as it goes now. Raises ChainError if the ledger cannot be read."""
        payouts = await self._outbox.open()
        open_ids = {payout.payout_id for payout in payouts}
        self._unsigned = {name: why for name, why in self._unsigned.items() if name in open_ids}
        self._overdue = {name: at_ms for name, at_ms in self._overdue.items() if name in open_ids}
        read_at_ms = self._now_ms()
        shown = await self._shown(payouts)
        await asyncio.gather(*(self._advance(payout, shown, read_at_ms) for payout in payouts))

    async def _shown(self, payouts: Sequence[Payout]) -> Mapping[int, Sequence[LedgerTransfer]]:
        """Return what the chain's ledger shows of the platform's own transfers, by nonce.

        Who has a key that was replaced sends from its address under any nonce.
        """
        posted = [payout for payout in payouts if payout.state in _AWAITING]
        if not posted:
            return {}
        since_ms, wanted = min(payout.since_ms for payout in posted), {payout.nonce for payout in posted}
        shown = defaultdict[int, list[LedgerTransfer]](list)
        for platform in self._platforms:
            async for page in self._chain.ledger_updates(platform, since_ms):
                for row in page:
                    if row.sender in self._platforms and row.nonce in wanted:
                        shown[row.nonce].append(row)
        return shown

    async def _advance(
        self, payout: Payout, shown: Mapping[int, Sequence[LedgerTransfer]], read_at_ms: int
    ) -> None:
        try:
            row = next((one for one in shown.get(payout.nonce, ()) if _shows(one, payout)), None)
            if payout.state in _AWAITING and row is not None:
                payout = await self._replace(payout, payout.paid(row.hash))
            await self._next(payout, read_at_ms)
        except Superseded:
            _LOG.warning("another process has advanced %s", payout.payout_id)
        except Exception:
            # It stays in the outbox unchanged; the others must not wait for it.
            _LOG.exception("%s could not be advanced", payout.payout_id)

    async def _next(self, payout: Payout, read_at_ms: int) -> None:
        now_ms = self._now_ms()
        due = now_ms >= payout.tried_at_ms + payout.backoff_ms
        match payout.state:
            case PayoutState.PLANNED:
                await self._sign(payout)
            case PayoutState.SIGNED if self._gives_up(payout.address):
                await self._replace(payout, payout.abandoned(_LEFT_OTHERWISE))
            case PayoutState.SIGNED:
                await self._send(payout)
            case PayoutState.SENT if now_ms >= payout.planned_at_ms + self._timeouts.give_up_ms:
                await self._replace(payout, payout.abandoned(payout.reason or "the chain did not answer"))
            case PayoutState.SENT if due:
                await self._send(payout)
            case PayoutState.ABANDONED if payout.burned_at_ms:
                if read_at_ms >= payout.burned_at_ms + self._timeouts.conclude_ms:
                    await self._conclude(payout)
            case PayoutState.ABANDONED if due:
                await self._burn(payout)
            case PayoutState.PAID | PayoutState.REFUSED:
                await self._close(payout)
            case PayoutState.ACCEPTED if now_ms >= payout.tried_at_ms + self._timeouts.conclude_ms:
                await self._conclude(payout)

    async def _conclude(self, payout: Payout) -> None:
        """Decide a payout that the platform's ledger does not show: it does not show all rows.

        The recipient's ledger may show it, or the account that the money is still there; else an admin has to
        say that it left.
        """
        if self._now_ms() < self._overdue.get(payout.payout_id, 0):
            return
        if await self._has_ended(payout):
            await self._outbox.remove(payout)
            return
        row = await arrival_of(
            self._chain,
            self._platforms,
            recipient=payout.address,
            lamports=payout.lamports,
            nonce=payout.nonce,
        )
        if row is not None:
            await self._close(await self._replace(payout, payout.paid(row.hash)))
        elif payout.state is PayoutState.ABANDONED and await self._is_still_there(payout):
            await self._close(await self._replace(payout, payout.refused()))
        else:
            if payout.payout_id not in self._overdue:
                _LOG.error("%s has no row: check, then `azu treasury payout-left`", payout.payout_id)
            self._overdue[payout.payout_id] = self._now_ms() + _LOOK_AGAIN_MS

    async def _is_still_there(self, payout: Payout) -> bool:
        """Whether the account holds all that the books say; another transfer to the address says so too."""
        if self._gives_up(payout.address):
            return True
        held = await balance_of(self._chain, self._platforms)
        return held >= await self._ledger.inside()

    async def _sign(self, payout: Payout) -> None:
        """Have the ledger set the money aside, then have it signed once and store the bytes."""
        is_withdrawal = payout.kind is PayoutKind.WITHDRAWAL
        if is_withdrawal and await self._withdrawals.refusal(payout.payout_id) is not None:
            await self._outbox.remove(payout)
            return
        planned = await self._ledger.result(payout.booking.id)
        if planned is None:
            if self._gives_up(payout.address):
                return
            set_aside = await self._set_aside(payout)
            if set_aside is None:
                return
            payout = set_aside
        else:
            transfer = planned.entry.transfer
            assert isinstance(transfer, PayoutPlanned | WithdrawalPlanned | RevenueTaken), "the id says so"
            if payout.nonce != transfer.nonce:
                payout = await self._replace(payout, payout.numbered(transfer.nonce))
        if await self._has_ended(payout):
            _LOG.warning("%s was paid or refused before; another process planned it late", payout.payout_id)
            await self._outbox.remove(payout)
            return
        if self._gives_up(payout.address):
            await self._replace(payout, payout.abandoned(_LEFT_OTHERWISE))
            return
        try:
            body = await self._signer.transfer(payout.request)
        except (RateLimited, Unavailable) as error:
            if self._unsigned.get(payout.payout_id) != error.message:
                self._unsigned[payout.payout_id] = error.message
                _LOG.warning("%s is not signed now: %s", payout.payout_id, error.message)
        except (Conflict, Forbidden, InvalidRequest) as error:
            _LOG.error("%s is given up: %s", payout.payout_id, error.message)
            await self._replace(payout, payout.abandoned(error.message))
        else:
            await self._send(await self._replace(payout, payout.signed(body)))

    async def _set_aside(self, payout: Payout) -> Payout | None:
        """Have the ledger set the money aside under a nonce that is fixed before; None if it does not."""
        for place in range(_MOST_PLACES):
            if place or not payout.nonce:
                chain_ms = await self._chain.now_ms()
                if not await self._has_place(payout.payout_id, chain_ms // NONCE_WINDOW_MS):
                    return None
                payout = await self._numbered(payout, chain_ms, place)
            try:
                await self._ledger.apply(payout.booking)
                return payout
            except (LedgerError, InsufficientBalance) as error:
                if error.code == "nonce_used":
                    continue  # another payout has it, or one of a later window was set aside first
                if await self._ledger.result(payout.booking.id) is not None:
                    raise
                _LOG.exception("%s is dropped: its account does not hold so much", payout.payout_id)
                if payout.kind is PayoutKind.WITHDRAWAL:
                    reason = "the account does not hold so much any more"
                    await self._withdrawals.refuse(payout.payout_id, reason)
                await self._outbox.remove(payout)
                self._numbered_in_window.discard(payout.payout_id)
                return None
        self._numbered_in_window.discard(payout.payout_id)
        _LOG.warning("%s waits: %d nonces of this time are taken", payout.payout_id, _MOST_PLACES)
        return None

    async def _has_place(self, payout_id: str, window: int) -> bool:
        """Say whether a payout may have a nonce of a window, and count it."""
        if window != self._window:
            # The books know those of this payer's predecessor.
            numbered = await self._ledger.numbered(window * NONCE_WINDOW_MS)
            if window != self._window:
                self._window, self._numbered_in_window = window, set(numbered)
        if len(self._numbered_in_window) >= _MOST_OF_WINDOW and payout_id not in self._numbered_in_window:
            return False
        self._numbered_in_window.add(payout_id)
        return True

    async def _numbered(self, payout: Payout, chain_ms: int, place: int) -> Payout:
        # Two copies of a network give one withdrawal the same id, and each worker's payout another one.
        name = payout.address if payout.kind is PayoutKind.EARNINGS else payout.payout_id
        nonce = nonce_for(payout.kind, name, chain_ms, place)
        return await self._replace(payout, payout.numbered(nonce))

    async def _has_ended(self, payout: Payout) -> bool:
        """Whether the books have the payout's end: a withdrawal can be planned twice under its one id."""
        ends = (f"{payout.payout_id}:paid", f"{payout.payout_id}:refused")
        return any([await self._ledger.result(end) is not None for end in ends])

    async def _send(self, payout: Payout) -> None:
        payout = await self._replace(payout, payout.sending(self._now_ms()))
        try:
            refusal = await self._chain.post_action(payout.body.encode())
        except ChainError as error:
            await self._replace(payout, payout.failed(error.message))
            return
        if refusal is None:
            await self._replace(payout, payout.accepted())
        elif refusal.nonce_used:
            # Used up, by an earlier post of these bytes or by a failed one: only the ledger shows which.
            payout = await self._replace(payout, payout.abandoned(payout.reason or refusal.reason))
            await self._replace(payout, payout.burned(self._now_ms()))
        elif payout.attempts >= self._timeouts.max_attempts:
            await self._replace(payout, payout.abandoned(refusal.reason))
        else:
            await self._replace(payout, payout.failed(refusal.reason))

    async def _burn(self, payout: Payout) -> None:
        """Use up the nonce of an abandoned payout, so that the chain never executes a copy of its bytes."""
        payout = await self._replace(payout, payout.burning(self._now_ms()))
        try:
            refusal = await self._chain.post_action((await self._signer.noop(payout.nonce)).encode())
        except Unavailable:
            return  # the next try comes when it is due
        too_old = self._now_ms() >= payout.nonce + _NONCE_LIFE_MS
        if refusal is None or refusal.nonce_used or too_old:
            await self._replace(payout, payout.burned(self._now_ms()))

    async def _close(self, payout: Payout) -> None:
        # An admin may have ended it before the chain showed it.
        if not await self._has_ended(payout):
            await self._ledger.apply(payout.booking)
        await self._outbox.remove(payout)
        if payout.state is PayoutState.PAID:
            _LOG.info("%s is paid: %s", payout.payout_id, payout.tx_hash)
        else:
            _LOG.error("%s is refused: %s", payout.payout_id, payout.reason)
            self._on_refused(payout.address)

    async def _replace(self, old: Payout, new: Payout) -> Payout:
        if not await self._outbox.replace(old, new):
            raise Superseded
        return new


def _shows(row: LedgerTransfer, payout: Payout) -> bool:
    return row.destination == payout.address and same_amount(row.amount, payout.lamports)
