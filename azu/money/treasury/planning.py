"""Who is paid next: the workers that are owed most, and withdrawals in turns."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from azu.auth.signatures import Withdrawal, is_signed
from azu.clock import wall_clock_ms
from azu.money.books import Books
from azu.money.chain.port import Chain
from azu.money.chain.rows import KEPT_LAMPORTS
from azu.money.signer.calls import SignerCalls
from azu.money.signer.views import PayoutKind, Room
from azu.money.treasury.outbox import Payout
from azu.money.treasury.redis import RedisOutbox
from azu.money.treasury.withdrawals import LEAST_LAMPORTS, RedisWithdrawals, SignedWithdrawal
from azu.units import MAX_LAMPORTS

_LOG = logging.getLogger(__name__)
# Actions of the address's budget that are kept for repeated posts and for burning nonces.
_ACTIONS_KEPT = 200
# Each payout takes one action, and up to two more when something fails.
_ACTIONS_PER_PAYOUT = 3
_ASK_AGAIN_MS = 600_000


@dataclass(frozen=True, slots=True)
class AmountOwed:
    """What a worker's address is owed, or a user's withdrawal takes."""

    address: str
    lamports: int


@dataclass(frozen=True, slots=True)
class Threshold:
    """The earnings from which on a worker is paid.

    The first payment to an account that is new to the chain costs the platform a fee in another token, so
    that such an account is paid from `new_account_lamports` on. The signer never signs more at once than
    `most_lamports` for a worker, and `most_withdrawn_lamports` for a user.
    """

    lamports: int
    new_account_lamports: int
    most_lamports: int = MAX_LAMPORTS
    most_withdrawn_lamports: int = MAX_LAMPORTS


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why an address is not paid now; a passing obstacle may be gone later without a change of the amount."""

    reason: str
    is_passing: bool = False


class PayoutSelector:
    """Selects the workers that are paid next."""

    def __init__(
        self,
        chain: Chain,
        ledger: Books,
        platforms: tuple[str, ...],
        threshold: Threshold,
        *,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._chain = chain
        self._ledger = ledger
        self._platforms = platforms
        self._platform = platforms[0]
        self._threshold = threshold
        self._now_ms = now_ms
        # Addresses that cannot be paid now, with the time of the next check.
        self._passed_over: dict[str, int] = {}

    async def select(self, open_lamports: Mapping[str, int], max_open: int) -> list[AmountOwed]:
        """Return the workers to pay now, the largest sums first. Raises ChainError.

        `open_lamports` maps addresses to their open payouts. All payouts together are never more than
        `max_open`, than the platform's wallet holds, or than the chain's budget of actions for its address.
        """
        owed = await self._owed(open_lamports)
        if not owed:
            return []
        room, funds = await self.capacity(open_lamports, max_open)
        selected: list[AmountOwed] = []
        for amount in owed:
            if len(selected) >= room:
                break
            if amount.lamports > funds:
                _LOG.error("the platform's wallet does not hold enough for what is owed: %s", amount)
                self.pass_over(amount.address)
            elif obstacle := await self.obstacle(amount):
                _LOG.warning("not paid now, %s: %s", obstacle.reason, amount)
                self.pass_over(amount.address)
            else:
                selected.append(amount)
                funds -= amount.lamports
        return selected

    async def capacity(self, open_lamports: Mapping[str, int], max_open: int) -> tuple[int, int]:
        """Return how many payouts and lamports can be sent beside the open ones. Raises ChainError."""
        budget = await self._chain.actions_left(self._platform) - _ACTIONS_KEPT
        room = min(max_open, budget // _ACTIONS_PER_PAYOUT) - len(open_lamports)
        held = await self._chain.spot_balance(self._platform)
        return room, held - KEPT_LAMPORTS - sum(open_lamports.values())

    async def obstacle(self, amount: AmountOwed) -> Obstacle | None:
        """Return why an amount cannot be sent, or is not worth its cost; None if it is. Raises ChainError."""
        recipient = await self._chain.recipient(amount.address, self._platform)
        if recipient.sanctioned:
            return Obstacle("the chain bars the address")
        if recipient.exists:
            return None
        if amount.lamports < self._threshold.new_account_lamports:
            return Obstacle("the amount is too small for an address that is new to the chain")
        if not recipient.has_fee:
            return Obstacle("the platform cannot pay the chain's fee for a new address", is_passing=True)
        return None

    def may_withdraw(self, lamports: int) -> bool:
        """Whether so much is ever sent to a user at once."""
        return lamports <= self._threshold.most_withdrawn_lamports

    def pass_over(self, address: str) -> None:
        """Leave an address out for _ASK_AGAIN_MS."""
        self._passed_over[address] = self._now_ms() + _ASK_AGAIN_MS

    async def _owed(self, open_lamports: Mapping[str, int]) -> list[AmountOwed]:
        now_ms = self._now_ms()
        self._passed_over = {address: until for address, until in self._passed_over.items() if until > now_ms}
        owed = []
        for address, lamports in (await self._ledger.owed()).items():
            if lamports >= self._threshold.lamports:
                amount = AmountOwed(address, min(lamports, self._threshold.most_lamports))
                # What the platform owes itself is in its wallet already.
                left_out = amount.address in self._platforms or amount.address in self._passed_over
                if amount.address not in open_lamports and not left_out:
                    owed.append(amount)
        return sorted(owed, key=lambda amount: (-amount.lamports, amount.address))


class WithdrawalPlanner:
    """Turns signed withdrawals into payouts, each once; safe to kill anywhere and to run twice."""

    def __init__(
        self,
        withdrawals: RedisWithdrawals,
        ledger: Books,
        outbox: RedisOutbox,
        selector: PayoutSelector,
        signer: SignerCalls,
        *,
        platforms: tuple[str, ...],
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._withdrawals = withdrawals
        self._ledger = ledger
        self._outbox = outbox
        self._selector = selector
        self._signer = signer
        self._platforms = platforms
        self._now_ms = now_ms

    async def plan(self, max_open: int, since_ms: int) -> None:
        """Write a payout for each waiting withdrawal that can be paid now. Raises ChainError, Unavailable.

        Addresses that got least today come first, then what waits longest. One that what is left for all does
        not cover keeps its place: no smaller one goes before it. A withdrawal waits until the ledger has set
        its money aside or it was refused, so that it is never lost in between. `since_ms` is a time of the
        chain that is not in the chain's future.
        """
        undecided = [
            signed for signed in await self._withdrawals.waiting() if not await self._settled(signed)
        ]
        if not undecided:
            return
        open_ = await self._outbox.open()
        open_lamports = {payout.address: payout.lamports for payout in open_}
        most = max_open + num_beside(PayoutKind.WITHDRAWAL, open_)
        room, funds = await self._selector.capacity(open_lamports, most)
        limits = await self._signer.room()
        planned = [one for one in open_ if one.kind is PayoutKind.WITHDRAWAL and not one.body]
        left = limits.all_lamports - sum(one.lamports for one in planned)
        is_full = False
        for signed in sorted(undecided, key=partial(_turn, limits)):
            withdrawal = signed.withdrawal
            if withdrawal.address in open_lamports:
                continue  # this withdrawal, or another payout to the same address
            if fault := self._fault(signed):
                await self._refuse(signed, fault)
            elif room <= 0 or withdrawal.lamports > funds:
                _LOG.error("the platform cannot send a withdrawal now: %s", withdrawal)
            elif is_full or withdrawal.lamports > limits.left(withdrawal.address):
                continue
            elif obstacle := await self._selector.obstacle(_owed(withdrawal)):
                if not obstacle.is_passing:
                    await self._refuse(signed, obstacle.reason)
            elif withdrawal.lamports > left:
                is_full = True
            else:
                await self._plan(signed, since_ms)
                room, funds, left = room - 1, funds - withdrawal.lamports, left - withdrawal.lamports

    async def _refuse(self, signed: SignedWithdrawal, reason: str) -> None:
        await self._withdrawals.refuse(signed.withdrawal.payout_id, reason)
        await self._withdrawals.take_out(signed)

    async def _settled(self, signed: SignedWithdrawal) -> bool:
        """Take a withdrawal out if the ledger has set its money aside or it was refused; return whether."""
        if not await self._is_decided(signed.withdrawal.payout_id):
            return False
        await self._withdrawals.take_out(signed)
        return True

    async def _is_decided(self, payout_id: str) -> bool:
        if await self._ledger.result(f"{payout_id}:planned") is not None:
            return True
        return await self._withdrawals.refusal(payout_id) is not None

    def _fault(self, signed: SignedWithdrawal) -> str | None:
        """Return what is wrong with a withdrawal; the treasury does not rely on the ingress's checks."""
        if not any(is_signed(signed.withdrawal, one, signed.signature) for one in self._platforms):
            return "it was not signed by its address"
        if signed.withdrawal.expires_at_ms <= self._now_ms():
            return "it expired before it was carried out"
        if signed.withdrawal.lamports < LEAST_LAMPORTS:
            return f"it is less than {LEAST_LAMPORTS} lamports, which the chain would remove"
        if not self._selector.may_withdraw(signed.withdrawal.lamports):
            return "it is more than this network ever sends to one address at once"
        return None

    async def _plan(self, signed: SignedWithdrawal, since_ms: int) -> None:
        withdrawal, signature = signed.withdrawal, signed.signature
        payout = Payout(
            payout_id=withdrawal.payout_id,
            address=withdrawal.address,
            lamports=withdrawal.lamports,
            planned_at_ms=self._now_ms(),
            since_ms=since_ms,
            kind=PayoutKind.WITHDRAWAL,
            expires_at_ms=withdrawal.expires_at_ms,
            proof=signature,
        )
        if await self._outbox.add(payout):
            _LOG.info("planned %s of %d lamports", payout.payout_id, payout.lamports)


def _turn(limits: Room, signed: SignedWithdrawal) -> tuple[int, int, str]:
    address = signed.withdrawal.address
    return limits.used_lamports.get(address, 0), signed.asked_at_ms, address


def num_beside(kind: PayoutKind, open_: Iterable[Payout]) -> int:
    """Return how many payouts are of other kinds: they take no room, as each kind has its limits."""
    return sum(payout.kind is not kind for payout in open_)


def _owed(withdrawal: Withdrawal) -> AmountOwed:
    return AmountOwed(withdrawal.address, withdrawal.lamports)
