"""Pays workers and users: carries every open payout on until the chain's ledger decides it."""

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from eth_account.signers.local import LocalAccount

from azu.addresses import ADDRESS_PATTERN
from azu.clock import wall_clock_ms
from azu.errors import AzuError, ChainError, InsufficientBalance, LedgerError
from azu.money.chain.actions import sign_noop, sign_send_asset
from azu.money.chain.port import Chain, Ledger, LedgerTransfer
from azu.money.treasury.deposits import same_amount
from azu.money.treasury.outbox import Outbox, Payout, PayoutState

_LOG = logging.getLogger(__name__)
_EARNED = re.compile(rf"worker:({ADDRESS_PATTERN}):earned")
# Actions of the address's budget that are kept for posting again and for burning nonces.
_ACTIONS_KEPT = 200
# Each payout takes one action, and up to two more when things go wrong.
_ACTIONS_PER_PAYOUT = 3
# An emptied account disappears from the chain together with its ledger, the proof of what was paid; and the
# chain sweeps what is under a million lamports.
KEPT_LAMPORTS = 2_000_000
_ASK_AGAIN_MS = 600_000


@dataclass(frozen=True, slots=True)
class AmountOwed:
    """What an address is owed."""

    address: str
    lamports: int


@dataclass(frozen=True, slots=True)
class Threshold:
    """From how much on earnings are paid out.

    The first payment to an account that is new to the chain costs the platform a fee in another token: such
    an account is paid from `new_account_lamports` on.
    """

    lamports: int
    new_account_lamports: int


class Payees(Protocol):
    """Who has claimed what is earned in its name."""

    async def has_claimed(self, address: str) -> bool:
        """Say whether an address may be paid what it earned."""


class PayoutSelector:
    """Picks who is paid next."""

    def __init__(
        self,
        chain: Chain,
        ledger: Ledger,
        payees: Payees,
        platform: str,
        threshold: Threshold,
        *,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._chain = chain
        self._ledger = ledger
        self._payees = payees
        self._platform = platform
        self._threshold = threshold
        self._now_ms = now_ms
        # Addresses that cannot be paid for now, with the time to ask about them again.
        self._passed_over: dict[str, int] = {}

    async def pick(self, open_lamports: Mapping[str, int], max_open: int) -> list[AmountOwed]:
        """Return who is to be paid now, the largest sums first. Raises ChainError.

        `open_lamports` holds the open payouts by address: together there are never more than `max_open`,
        than the platform's wallet can spare, or than the chain's budget of actions for its address bears.
        """
        owed = await self._owed(open_lamports)
        if not owed:
            return []
        room, funds = await self.spare(open_lamports, max_open)
        picked: list[AmountOwed] = []
        for due in owed:
            if len(picked) >= room:
                break
            if due.lamports > funds:
                _LOG.error("the platform's wallet cannot spare what is owed: %s", due)
                self.pass_over(due.address)
            elif await self._payees.has_claimed(due.address) and await self.payable(due):
                picked.append(due)
                funds -= due.lamports
            else:
                self.pass_over(due.address)
        return picked

    async def spare(self, open_lamports: Mapping[str, int], max_open: int) -> tuple[int, int]:
        """Return how many payouts and lamports can be sent beside the open ones. Raises ChainError."""
        budget = await self._chain.actions_left(self._platform) - _ACTIONS_KEPT
        room = min(max_open, budget // _ACTIONS_PER_PAYOUT) - len(open_lamports)
        held = await self._chain.spot_balance(self._platform)
        return room, held - KEPT_LAMPORTS - sum(open_lamports.values())

    async def payable(self, due: AmountOwed) -> bool:
        """Say whether an address can be paid, and it is worth what that costs. Raises ChainError."""
        destination = await self._chain.destination(due.address, self._platform)
        if destination.sanctioned:
            _LOG.error("the chain bars an address that is owed: %s", due)
            return False
        return destination.exists or due.lamports >= self._threshold.new_account_lamports

    def pass_over(self, address: str) -> None:
        """Leave an address out for a while."""
        self._passed_over[address] = self._now_ms() + _ASK_AGAIN_MS

    async def _owed(self, open_lamports: Mapping[str, int]) -> list[AmountOwed]:
        now_ms = self._now_ms()
        self._passed_over = {address: until for address, until in self._passed_over.items() if until > now_ms}
        owed = []
        for account, lamports in (await self._ledger.balances()).items():
            match = _EARNED.fullmatch(account)
            if match and lamports >= self._threshold.lamports:
                due = AmountOwed(match[1], lamports)
                # What the platform owes itself is in its wallet already.
                left_out = due.address == self._platform or due.address in self._passed_over
                if due.address not in open_lamports and not left_out:
                    owed.append(due)
        return sorted(owed, key=lambda due: (-due.lamports, due.address))


# The chain takes a nonce for two days; a third for a clock that is wrong.
_NONCE_LIFE_MS = 3 * 86_400_000


@dataclass(frozen=True, slots=True)
class PayoutTimeouts:
    """How long the payer waits for the chain.

    A refused post is repeated up to `max_attempts` times, one without an answer for `give_up_ms`, well within
    the two days for which a nonce is good. The chain's ledger decides an abandoned payout `conclude_ms`
    after its nonce was used up: longer than any row of it ever came late.
    """

    max_attempts: int = 5
    give_up_ms: int = 12 * 3_600_000
    conclude_ms: int = 600_000


class Superseded(Exception):
    """Another process has carried the payout on since it was read."""


class Withdrawals(Protocol):
    """Where payouts to users come from."""

    async def was_refused(self, payout: Payout) -> bool:
        """Say whether a payout's user was told that nothing will come of it."""

    async def dropped(self, payout: Payout) -> None:
        """Hear of a payout for which the ledger set nothing aside."""


class _NoWithdrawals:
    """For workers alone: what they earned stays earned."""

    async def was_refused(self, _: Payout) -> bool:
        return False

    async def dropped(self, _: Payout) -> None:
        return None


class Payer:
    """Carries payouts on, one step at a time; safe to kill anywhere and to run twice."""

    def __init__(
        self,
        chain: Chain,
        ledger: Ledger,
        outbox: Outbox,
        account: LocalAccount,
        patience: PayoutTimeouts,
        *,
        on_refused: Callable[[str], None],
        withdrawals: Withdrawals | None = None,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._chain = chain
        self._ledger = ledger
        self._outbox = outbox
        self._account = account
        self._platform = account.address.lower()
        self._patience = patience
        self._on_refused = on_refused
        self._withdrawals = withdrawals or _NoWithdrawals()
        self._now_ms = now_ms
        self._overdue: set[str] = set()

    async def plan(self, dues: Sequence[AmountOwed], since_ms: int) -> None:
        """Write down a payout for everybody who is due; addresses that have one open are passed over.

        `since_ms` is a time of the chain that is not in its future.
        """
        for due in dues:
            payout = Payout(
                payout_id=f"payout:{due.address}:{secrets.token_hex(12)}",
                address=due.address,
                lamports=due.lamports,
                planned_at_ms=self._now_ms(),
                since_ms=since_ms,
            )
            if await self._outbox.add(payout):
                _LOG.info("planned %s of %d lamports", payout.payout_id, payout.lamports)

    async def carry_on(self) -> None:
        """Take every open payout as far as it goes now. Raises ChainError if the ledger cannot be read."""
        payouts = await self._outbox.open()
        looked_ms = self._now_ms()
        shown = await self._shown(payouts)
        await asyncio.gather(*(self._carry_on(payout, shown, looked_ms) for payout in payouts))

    async def _shown(self, payouts: Sequence[Payout]) -> Mapping[int, LedgerTransfer]:
        """Return what the chain's ledger shows of the platform's own transfers, by nonce."""
        posted = [payout for payout in payouts if payout.state in _AWAITING]
        if not posted:
            return {}
        since_ms = min(payout.since_ms for payout in posted)
        return {
            row.nonce: row
            async for page in self._chain.ledger_updates(self._platform, since_ms)
            for row in page
            if row.sender == self._platform and row.nonce is not None
        }

    async def _carry_on(self, payout: Payout, shown: Mapping[int, LedgerTransfer], looked_ms: int) -> None:
        try:
            row = shown.get(payout.nonce)
            if payout.state in _AWAITING and row is not None and _shows(row, payout):
                payout = await self._become(payout, payout.paid(row.hash))
            await self._next(payout, looked_ms)
        except Superseded:
            _LOG.warning("%s is carried on by another process", payout.payout_id)
        except AzuError:
            # It stays in the outbox as it is; the others must not wait for it.
            _LOG.exception("%s could not be carried on", payout.payout_id)

    async def _next(self, payout: Payout, looked_ms: int) -> None:
        now_ms = self._now_ms()
        due = now_ms >= payout.tried_at_ms + payout.backoff_ms
        match payout.state:
            case PayoutState.PLANNED:
                await self._sign(payout)
            case PayoutState.SIGNED:
                await self._send(payout)
            case PayoutState.SENT if now_ms >= payout.planned_at_ms + self._patience.give_up_ms:
                await self._become(payout, payout.abandoned(payout.reason or "the chain did not answer"))
            case PayoutState.SENT if due:
                await self._send(payout)
            case PayoutState.ABANDONED if payout.burned_at_ms:
                if looked_ms >= payout.burned_at_ms + self._patience.conclude_ms:
                    await self._close(await self._become(payout, payout.refused()))
            case PayoutState.ABANDONED if due:
                await self._burn(payout)
            case PayoutState.PAID | PayoutState.REFUSED:
                await self._close(payout)
            case PayoutState.ACCEPTED if now_ms >= payout.tried_at_ms + self._patience.conclude_ms:
                # The chain said yes: nothing to send again or to give up, but somebody has to look.
                if payout.payout_id not in self._overdue:
                    self._overdue.add(payout.payout_id)
                    _LOG.error("the chain accepted %s but does not show it", payout.payout_id)

    async def _sign(self, payout: Payout) -> None:
        """Have the ledger set the money aside, then sign once and store the bytes."""
        if await self._withdrawals.was_refused(payout):
            await self._outbox.remove(payout)
            return
        try:
            await self._ledger.apply(payout.booking)
        except (LedgerError, InsufficientBalance):
            if await self._ledger.result(payout.booking.id) is not None:
                raise
            _LOG.exception("%s is dropped: its account does not bear it", payout.payout_id)
            await self._withdrawals.dropped(payout)
            await self._outbox.remove(payout)
            return
        if await self._has_ended(payout):
            _LOG.warning("%s was carried out before; another process planned it late", payout.payout_id)
            await self._outbox.remove(payout)
            return
        nonce = await self._outbox.next_nonce(self._now_ms())
        action = sign_send_asset(
            self._account,
            self._chain.network,
            destination=payout.address,
            lamports=payout.lamports,
            nonce=nonce,
        )
        await self._send(await self._become(payout, payout.signed(action)))

    async def _has_ended(self, payout: Payout) -> bool:
        """Say whether the books have its end: one of which the id is known may be planned a second time."""
        ends = (f"{payout.payout_id}:paid", f"{payout.payout_id}:refused")
        return any([await self._ledger.result(end) is not None for end in ends])

    async def _send(self, payout: Payout) -> None:
        payout = await self._become(payout, payout.sending(self._now_ms()))
        try:
            refusal = await self._chain.post_action(payout.body.encode())
        except ChainError as error:
            await self._become(payout, payout.failed(error.message))
            return
        if refusal is None:
            await self._become(payout, payout.accepted())
        elif refusal.nonce_used:
            # Used up, by an earlier post of these bytes or by one that failed: only the ledger knows.
            payout = await self._become(payout, payout.abandoned(payout.reason or refusal.reason))
            await self._become(payout, payout.burned(self._now_ms()))
        elif payout.attempts >= self._patience.max_attempts:
            await self._become(payout, payout.abandoned(refusal.reason))
        else:
            await self._become(payout, payout.failed(refusal.reason))

    async def _burn(self, payout: Payout) -> None:
        """Use up the nonce of an abandoned payout, so that no copy of its bytes can be carried out later."""
        payout = await self._become(payout, payout.burning(self._now_ms()))
        noop = sign_noop(self._account, self._chain.network, nonce=payout.nonce)
        try:
            refusal = await self._chain.post_action(noop.body)
        except ChainError:
            return  # tried again when it is due
        too_old = self._now_ms() >= payout.nonce + _NONCE_LIFE_MS
        if refusal is None or refusal.nonce_used or too_old:
            await self._become(payout, payout.burned(self._now_ms()))

    async def _close(self, payout: Payout) -> None:
        await self._ledger.apply(payout.booking)
        await self._outbox.remove(payout)
        if payout.state is PayoutState.PAID:
            _LOG.info("%s is paid: %s", payout.payout_id, payout.tx_hash)
        else:
            _LOG.error("%s is refused: %s", payout.payout_id, payout.reason)
            self._on_refused(payout.address)

    async def _become(self, old: Payout, new: Payout) -> Payout:
        if not await self._outbox.replace(old, new):
            raise Superseded
        return new


_AWAITING = (PayoutState.SENT, PayoutState.ACCEPTED, PayoutState.ABANDONED)


def _shows(row: LedgerTransfer, payout: Payout) -> bool:
    return row.destination == payout.address and same_amount(row.amount, payout.lamports)
