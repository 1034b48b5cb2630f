"""Who is due a payout, and whether the platform can and should make it now."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from azu.treasury.clock import wall_clock_ms
from azu.treasury.ports import Chain, Ledger

_LOG = logging.getLogger(__name__)
_EARNED = re.compile(r"worker:(0x[0-9a-f]{40}):earned")
# Actions of the address's budget that are kept for posting again and for burning nonces.
_ACTIONS_KEPT = 200
# Each payout takes one action, and up to two more when things go wrong.
_ACTIONS_PER_PAYOUT = 3
# An emptied account disappears from the chain together with its ledger, the proof of what was paid; and the
# chain sweeps what is under a million lamports.
KEPT_LAMPORTS = 2_000_000
_ASK_AGAIN_MS = 600_000


@dataclass(frozen=True, slots=True)
class Due:
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


class Dues:
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

    async def pick(self, open_lamports: Mapping[str, int], max_open: int) -> list[Due]:
        """Return who is to be paid now, the largest sums first. Raises ChainError.

        `open_lamports` holds the open payouts by address: together there are never more than `max_open`,
        than the platform's wallet can spare, or than the chain's budget of actions for its address bears.
        """
        owed = await self._owed(open_lamports)
        if not owed:
            return []
        room, funds = await self.spare(open_lamports, max_open)
        picked: list[Due] = []
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

    async def payable(self, due: Due) -> bool:
        """Say whether an address can be paid, and it is worth what that costs. Raises ChainError."""
        destination = await self._chain.destination(due.address, self._platform)
        if destination.sanctioned:
            _LOG.error("the chain bars an address that is owed: %s", due)
            return False
        return destination.exists or due.lamports >= self._threshold.new_account_lamports

    def pass_over(self, address: str) -> None:
        """Leave an address out for a while."""
        self._passed_over[address] = self._now_ms() + _ASK_AGAIN_MS

    async def _owed(self, open_lamports: Mapping[str, int]) -> list[Due]:
        now_ms = self._now_ms()
        self._passed_over = {address: until for address, until in self._passed_over.items() if until > now_ms}
        owed = []
        for account, lamports in (await self._ledger.balances()).items():
            match = _EARNED.fullmatch(account)
            if match and lamports >= self._threshold.lamports:
                due = Due(match[1], lamports)
                # What the platform owes itself is in its wallet already.
                left_out = due.address == self._platform or due.address in self._passed_over
                if due.address not in open_lamports and not left_out:
                    owed.append(due)
        return sorted(owed, key=lambda due: (-due.lamports, due.address))
