"""What the books do at each call: they check keys, fix prices, charge and share out, over the one ledger."""

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from azu.auth.key_records import ApiKey
from azu.auth.network_id import Succession
from azu.auth.signatures import (
    MAX_WITHDRAWAL_LIFE_MS,
    ReceiptSignature,
    Withdrawal,
    is_claim,
    is_dispute,
    is_signed,
)
from azu.auth.succession import platforms_of
from azu.clock import DAY_MS, wall_clock_ms
from azu.errors import (
    Conflict,
    Forbidden,
    InsufficientBalance,
    InvalidRequest,
    JournalFault,
    LedgerError,
    NotFound,
    RateLimited,
    TransferConflict,
)
from azu.money.books import (
    NOT_PROVIDED,
    BooksCalls,
    BooksTerms,
    HeldMoney,
    JobDecision,
    JobDispute,
    KeySpending,
    ReversibleJobs,
    Totals,
    TreasuryTransfer,
    UserBalance,
    WorkerEarnings,
)
from azu.money.books_view import open_payouts_of, payouts_numbered, view_of, withdrawals_since
from azu.money.chain.rows import is_sent_by
from azu.money.charging import UNSHOWN, charge_of
from azu.money.commands import carry_out, refusals_as_conflicts
from azu.money.endings import LOST, pack_ending
from azu.money.holds import Holds
from azu.money.keys import Keys, check_num_claims
from azu.money.ledger.audit import Audit
from azu.money.ledger.entry import Result
from azu.money.ledger.journal import RedisJournal
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.seals import Seals
from azu.money.ledger.state import KEPT_DAYS, KEPT_MS, BooksState
from azu.money.ledger.transfers import (
    HELD,
    Disputed,
    EarningsClaimed,
    Expire,
    HeldPaid,
    NodeEnrolled,
    PayoutPlanned,
    PlatformReplaced,
    Release,
    Reserve,
    RevenueTaken,
    Reversed,
    UnknownOut,
    WithdrawalPlanned,
    WriterOpened,
    is_fee,
    node_held,
    user_available,
    user_reserved,
    user_withdrawing,
    worker_earned,
    worker_paid,
    worker_paying,
)
from azu.money.model_fees import ModelFees
from azu.money.overview import held_in, reversible_in, totals_of
from azu.money.receipts import ReceiptKey
from azu.money.signer.views import BooksHead, BooksView, OpenPayout
from azu.money.treasury.redis import RedisCursor, RedisUncredited, Uncredited
from azu.money.treasury.withdrawals import (
    LEAST_LAMPORTS,
    RedisWithdrawals,
    SignedWithdrawal,
    WithdrawalStatus,
)
from azu.protocol.job import JobEnding, JobOutcome
from azu.redis_client import connect_redis
from azu.units import hype_from_lamports

_LOG = logging.getLogger(__name__)
# A caller is answered within a second while Redis is away.
_SILENCE_S = 0.5
# So that no job has the name of a key, of an address or of a fee, and a wallet can sign that it disputes it.
_JOB_ID = re.compile(r"job-[A-Za-z0-9-]{1,60}")
_OVERDUE_AT_ONCE = 1000
# The chain counts the transfers of the platform's address, whatever they move.
_MAX_WITHDRAWALS_A_DAY = 24


class Bookkeeper(BooksCalls):
    """Carries out the calls of the books, which azu/money/books.py describes.

    The ledger is opened at the first call; no other process may have it open. What was signed for an
    address that the platform had before, and waits, stays good. `hears` sets the clock that
    `now_ms` reads to the chain's time.
    """

    def __init__(
        self,
        redis_url: str,
        folder: Path,
        platform: str,
        terms: BooksTerms,
        *,
        successions: tuple[Succession, ...] = (),
        receipts: ReceiptKey | None = None,
        now_ms: Callable[[], int] = wall_clock_ms,
        hears: Callable[[int], None] | None = None,
    ) -> None:
        self._hears = hears
        self._receipts = receipts
        self._redis = connect_redis(redis_url, silence_s=_SILENCE_S)
        self._folder = folder
        self._platform = platform
        self._successions = successions
        self._platforms = platforms_of(platform, successions)
        self._terms = terms
        self._now_ms = now_ms
        self._journal = RedisJournal(self._redis)
        self._opening = asyncio.Lock()
        self._open: Ledger | None = None
        self._withdrawals = RedisWithdrawals(self._redis)
        self._uncredited = RedisUncredited(self._redis)
        self._cursor = RedisCursor(self._redis)
        self._keys = Keys(self.ledger, platform, terms, now_ms)
        self._holds = Holds(self.ledger, self._keys, terms.max_reservations)
        self._fees = ModelFees(self.ledger, self._holds, terms)
        self._opened_at_ms = 0
        # Why the signer signs nothing; empty while it does.
        self._unsigned: tuple[str, ...] = ()
        # Why the journal is not what was written; empty while it is.
        self._changed = ""

    async def ledger(self) -> Ledger:
        """Return the ledger, which is opened if it was not; raises Unavailable."""
        if self._open is None:
            async with self._opening:
                if self._open is None:
                    self._open = await Ledger.open(self._journal, Seals(self._folder), self._now_ms)
        return self._open

    async def note_successions(self) -> None:
        """Have the journal say which key of the platform replaced which, once."""
        ledger = await self.ledger()
        for one in self._successions:
            if {one.old, one.new} <= set(self._platforms):
                replaced = PlatformReplaced(
                    id=f"platform:{one.new}", old=one.old, new=one.new, by_old=one.by_old, by_new=one.by_new
                )
                await ledger.apply(replaced)

    async def verify(self) -> None:
        """Read the journal again; once it was changed, `loss` says so, and nothing may be signed."""
        try:
            await (await self._looked()).verify()
        except JournalFault as error:
            if error.code not in ("journal_changed", "another_writer"):
                raise
            _LOG.error("%s: nothing is signed any more", error.message)
            self._changed = error.message

    async def _looked(self) -> Ledger:
        """Return the ledger once it knows how far its store goes; one that went back is noted as a loss."""
        ledger = await self.ledger()
        head = ledger.head
        if await self._journal.head() != head == ledger.head:
            # A write finds out what became of the others before it.
            await ledger.apply(WriterOpened(id=f"writer:{secrets.token_hex(16)}"))
        return ledger

    async def seal(self, at_least: int) -> None:
        """Move old entries into files, once there are so many."""
        await (await self.ledger()).seal(at_least)

    async def close(self) -> None:
        """Close the ledger and the connections."""
        if self._open is not None:
            await self._open.close()
        await self._redis.aclose()

    async def key(self, bearer: str) -> ApiKey:
        return await self._keys.find(bearer)

    async def open_key(self, key: ApiKey) -> None:
        await self._keys.open(key)

    async def drop_unfunded_keys(self) -> None:
        """Revoke the keys of addresses that never had money, once they are old enough."""
        await self._keys.drop_unfunded()

    async def revoke_key(self, bearer: str, key_id: str) -> None:
        await self._keys.revoke(bearer, key_id)

    async def keys(self, address: str) -> tuple[KeySpending, ...]:
        return await self._keys.of(address)

    async def paid(self, address: str) -> int:
        return (await self.ledger()).state.in_days(address, self._now_ms(), KEPT_DAYS)

    async def price(self) -> int:
        return self._terms.lamports_per_token_layer

    async def reserve(
        self,
        bearer: str,
        job_id: str,
        *,
        model_id: str,
        revision: str,
        num_layers: int,
        prompt_tokens: int,
        max_tokens: int,
    ) -> int:
        key, ledger = await self._keys.find(bearer), await self.ledger()
        if not _JOB_ID.fullmatch(job_id):
            raise InvalidRequest(f"{job_id} is no job's id", param="job_id")
        if num_layers < 1 or prompt_tokens + max_tokens < 1:
            raise InvalidRequest("a job has layers and tokens", param="max_tokens")
        now_ms = ledger.now_ms()
        asked = Reserve(
            id=f"reserve:{job_id}",
            address=key.address,
            job_id=job_id,
            expires_at_ms=now_ms + self._terms.reservation_ttl_ms,
            reserved_at_ms=now_ms,
            key_id=key.key_id,
            model_id=model_id,
            revision=revision,
            num_layers=num_layers,
            lamports_per_token_layer=self._terms.lamports_per_token_layer,
            platform_percent=self._terms.platform_percent,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )
        return await self._holds.set_aside(key, asked)

    async def reserve_fetch(self, bearer: str, fetch_id: str, *, model_id: str, num_bytes: int) -> int:
        key = await self._keys.find(bearer)
        return await self._fees.set_aside(key, fetch_id, model_id=model_id, num_bytes=num_bytes)

    async def give_fees_back(self, model_id: str) -> None:
        await self._fees.give_back(model_id)

    async def charge_unused(self) -> None:
        """Charge the fees for models that were not used in time."""
        await self._fees.charge_unused()

    async def give_back(self, job_id: str) -> None:
        ledger = await self.ledger()
        lost = Release(id=f"release:{job_id}", job_id=job_id, outcome=pack_ending(LOST))
        try:
            # Behind what is being written: the reservation may be among that, and was not known before.
            await ledger.apply(lost)
        except (LedgerError, TransferConflict) as error:
            if isinstance(error, LedgerError) and error.code not in ("unknown_hold", "hold_ended"):
                raise

    async def settle(
        self,
        job_id: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        work: Mapping[int, Mapping[str, int]],
        ending: JobEnding,
    ) -> JobOutcome:
        ledger = await self.ledger()
        hold = None if is_fee(job_id) else ledger.state.reservations.get(job_id)
        if hold is None:
            ended = await self.ended(job_id)
            if ended is None:
                raise LedgerError(f"nothing is reserved for {job_id}", code="unknown_hold")
            # The first call may have ended before this.
            return await self._with_fees_back(ended)
        end = charge_of(
            hold,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            work=work,
            ending=ending,
            nodes=ledger.state.nodes,
            terms=self._terms,
            now_ms=ledger.now_ms(),
        )
        return await self._with_fees_back(await self._holds.end(hold, end))

    async def _with_fees_back(self, outcome: JobOutcome) -> JobOutcome:
        """Give the model's fees back where its job was charged, or the network has no place for it."""
        if outcome.receipt.charged_lamports or (outcome.error or {}).get("code") in NOT_PROVIDED:
            await self._fees.give_back(outcome.receipt.model_id)
        return outcome

    async def ended(self, job_id: str) -> JobOutcome | None:
        return await self._holds.ended(job_id)

    async def receipt_signature(self, job_id: str) -> ReceiptSignature | None:
        outcome = await self.ended(job_id)
        if outcome is None or self._receipts is None or await self._journal_fault():
            return None
        return self._receipts.sign(outcome.receipt)

    async def overdue(self) -> tuple[str, ...]:
        expired = (await self.ledger()).state.expired(self._now_ms())
        jobs = (hold.job_id for hold in expired if not is_fee(hold.job_id))
        return tuple(islice(jobs, _OVERDUE_AT_ONCE))

    async def expire(self, job_id: str) -> None:
        hold = (await self.ledger()).state.reservations.get(job_id)
        if hold is None or is_fee(job_id):
            return
        if hold.expires_at_ms > self._now_ms():
            raise Conflict(f"the reservation for {job_id} does not expire yet")
        await self._holds.end(hold, Expire(id=f"expire:{job_id}", job_id=job_id))

    async def dispute(self, address: str, job_id: str, signature: str) -> JobDispute:
        ledger = await self.ledger()
        hold = await self._holds.of(job_id)
        if hold is None or hold.address != address:
            raise NotFound(f"{address} paid for no job {job_id}", param="job_id", code="job_not_found")
        if not is_dispute(address, job_id, self._platform, signature):
            raise Forbidden("this dispute was not signed by the key's address", param="signature")
        if job_id in ledger.state.reservations:
            raise Conflict(f"{job_id} has not ended", code="job_not_finished")
        disputed = await ledger.result(f"disputed:{job_id}")
        if disputed is None:
            transfer = Disputed(id=f"disputed:{job_id}", job_id=job_id, signature=signature)
            with refusals_as_conflicts():
                disputed = await ledger.apply(transfer)
        held = sum(leg.lamports for leg in disputed.entry.legs if leg.account == HELD)
        return JobDispute(job_id, address, held)

    async def decision(self, job_id: str) -> JobDecision:
        ledger = await self.ledger()
        decided = await ledger.result(f"decided:{job_id}")
        if decided is not None:
            # All that the entry adds goes to the payer, or to those who earned it.
            added = sum(leg.lamports for leg in decided.entry.legs if leg.lamports > 0)
            is_reversal = isinstance(decided.entry.transfer, Reversed)
            return JobDecision("reversed", added) if is_reversal else JobDecision("dismissed")
        held = ledger.state.disputes.get(job_id)
        return JobDecision() if held is None else JobDecision("held", held.lamports)

    async def balance(self, address: str) -> UserBalance:
        accounts = user_available(address), user_reserved(address), user_withdrawing(address)
        return UserBalance(*map((await self.ledger()).state.balance, accounts))

    async def earnings(self, address: str) -> WorkerEarnings:
        state = (await self.ledger()).state
        return WorkerEarnings(
            earned_lamports=state.balance(worker_earned(address)),
            paying_lamports=state.balance(worker_paying(address)),
            paid_lamports=state.balance(worker_paid(address)),
            claimed=address in state.claims,
        )

    async def claim_earnings(self, address: str, signature: str) -> None:
        if not is_claim(address, self._platform, signature):
            raise Forbidden("this claim was not signed by the key's address", param="signature")
        ledger = await self.ledger()
        if address not in ledger.state.claims:
            check_num_claims(ledger.state, address, self._terms.max_unfunded_keys)
            claim = EarningsClaimed(id=f"claim:{address}", address=address, signature=signature)
            await ledger.apply(claim)

    async def withdraw(self, withdrawal: Withdrawal, signature: str) -> WithdrawalStatus:
        if withdrawal.lamports < LEAST_LAMPORTS:
            least = hype_from_lamports(LEAST_LAMPORTS)
            raise InvalidRequest(f"a withdrawal is of at least {least} HYPE", param="lamports")
        if not any(is_signed(withdrawal, one, signature) for one in self._platforms):
            raise Forbidden("this withdrawal was not signed by the key's address", param="signature")
        if not 0 < withdrawal.expires_at_ms - self._now_ms() <= MAX_WITHDRAWAL_LIFE_MS:
            raise InvalidRequest("a withdrawal is good for at most a day, from now on", param="expires_at_ms")
        ledger = await self.ledger()
        planned = await ledger.result(f"{withdrawal.payout_id}:planned")
        if planned is None:
            a_day_ago_ms, most = self._now_ms() - DAY_MS, _MAX_WITHDRAWALS_A_DAY
            if withdrawals_since(ledger.state, withdrawal.address, a_day_ago_ms) >= most:
                raise RateLimited(
                    f"{most} withdrawals of this address were sent in a day; withdraw more at once",
                    code="too_many_withdrawals",
                    retry_after_s=3600.0,
                )
            available = ledger.state.balance(user_available(withdrawal.address))
            if withdrawal.lamports > available:
                holds, takes = hype_from_lamports(available), hype_from_lamports(withdrawal.lamports)
                raise InsufficientBalance(f"the account holds {holds} HYPE; this takes {takes}")
            await self._withdrawals.hand_in(SignedWithdrawal(withdrawal, signature, self._now_ms()))
        else:
            transfer = planned.entry.transfer
            if not isinstance(transfer, WithdrawalPlanned) or transfer.lamports != withdrawal.lamports:
                raise Conflict("this nonce was used before for another withdrawal", param="nonce")
        return await self.withdrawal(withdrawal.address, withdrawal.nonce)

    async def withdrawal(self, address: str, nonce: int) -> WithdrawalStatus:
        ledger = await self.ledger()
        return await self._withdrawals.status(address, nonce, ledger.result)

    async def enrol_node(
        self, node_id: str, payout: str, *, key_digest: str, name: str, work_bytes_per_s: int
    ) -> None:
        if node_id == UNSHOWN:
            raise Forbidden("no node has this id", param="node_id")
        ledger = await self.ledger()
        known = ledger.state.nodes.get(node_id)
        if known is not None and known.key_digest != key_digest:
            raise Conflict("this node is enrolled with another key", code="node_taken")
        if known is None:
            self._check_num_nodes(ledger.state, key_digest)
        if known is None or (known.payout, known.name, known.work_bytes_per_s) != (
            payout, name, work_bytes_per_s,
        ):  # fmt: skip
            node = NodeEnrolled(
                id=f"node:{node_id}:{ledger.head.number}",
                node_id=node_id,
                payout=payout,
                key_digest=key_digest,
                name=name,
                work_bytes_per_s=work_bytes_per_s,
            )
            with refusals_as_conflicts():
                await ledger.apply(node)
        if held := ledger.state.free(node_held(node_id)):
            paid = HeldPaid(
                id=f"held-paid:{node_id}:{ledger.head.number}", node_id=node_id, address=payout, lamports=held
            )
            await ledger.apply(paid)

    def _check_num_nodes(self, state: BooksState, key_digest: str) -> None:
        """Count by the machine, and not by the address, which others may name too."""
        most = self._terms.max_nodes
        if sum(one.key_digest == key_digest for one in state.nodes.values()) >= most:
            raise Forbidden(
                f"this machine has {most} nodes, which is all that it may have (limits.max_nodes)",
                param="node_id",
                code="too_many_nodes",
            )

    async def apply(self, transfer: TreasuryTransfer) -> None:
        ledger = await self.ledger()
        if isinstance(transfer, UnknownOut) and await ledger.result(transfer.id) is None:
            if await _is_known(ledger, transfer):
                return
            is_open = any(one.address == transfer.address for one in ledger.state.payouts.values())
            # Who has a key that was replaced could keep each payout from its end.
            if is_open and not is_sent_by(transfer.id, self._platforms[1:]):
                # Else the payout's money would stay set aside, and be paid a second time.
                message = f"{transfer.id}: a payout to {transfer.address} is open, and has to end first"
                raise Conflict(message, code="payout_open")
        await ledger.apply(transfer)

    async def result(self, transfer_id: str) -> Result | None:
        return await (await self.ledger()).result(transfer_id)

    async def open_payouts(self) -> tuple[OpenPayout, ...]:
        return open_payouts_of((await self.ledger()).state)

    async def numbered(self, since: int) -> tuple[str, ...]:
        return payouts_numbered((await self.ledger()).state, since)

    async def view(self, number: int, after: int, findings: tuple[str, ...] = ()) -> BooksView:
        self._unsigned = findings
        if fault := await self._journal_fault():
            raise JournalFault(fault)
        ledger, read_until_ms = await self.ledger(), await self._cursor.read()
        self._opened_at_ms = self._opened_at_ms or (await ledger.entry(1)).at_ms
        return await view_of(
            ledger, number, after, opened_at_ms=self._opened_at_ms, read_until_ms=read_until_ms
        )

    async def owed(self) -> Mapping[str, int]:
        state = (await self.ledger()).state
        free = {address: state.free(worker_earned(address)) for address in state.claims}
        return {address: lamports for address, lamports in free.items() if lamports > 0}

    async def hear_time(self, chain_ms: int) -> None:
        if self._hears is not None:
            self._hears(chain_ms)
        (await self.ledger()).is_timed = True

    async def inside(self) -> int:
        return (await self.ledger()).state.inside

    async def totals(self) -> Totals:
        ledger = await self.ledger()
        revenue_left = ledger.state.facts.get("revenue_left", 0)
        totals = totals_of(ledger.state.balances, ledger.lost, revenue_left)
        return replace(totals, unsigned=self._unsigned)

    async def loss(self) -> int:
        if self._changed:
            raise JournalFault(self._changed, code="journal_changed")
        return (await self._looked()).lost

    async def findings(self) -> tuple[str, ...]:
        fault = await self._journal_fault()
        return (fault, *self._unsigned) if fault else self._unsigned

    async def _journal_fault(self) -> str:
        """Return what is wrong with the journal, empty if nothing is."""
        try:
            lost = await self.loss()
        except JournalFault as error:
            return error.message
        return f"the ledger went back by {lost} entries" if lost else ""

    async def head(self) -> BooksHead:
        head = (await self.ledger()).head
        return BooksHead(head.number, head.hash)

    async def held(self) -> HeldMoney:
        return held_in((await self.ledger()).state)

    async def reversible(self, address: str) -> ReversibleJobs:
        return reversible_in((await self.ledger()).state, address)

    async def command(self, text: str) -> None:
        await carry_out(text, await self.ledger(), self._platform, self._terms.admins, self._now_ms())

    async def uncredited(self) -> tuple[Uncredited, ...]:
        return await self._uncredited.all()

    async def audit(self, wallet_lamports: int | None = None, since: int = 0) -> Audit:
        return await (await self.ledger()).audit(wallet_lamports, since=since)


async def _is_known(ledger: Ledger, out: UnknownOut) -> bool:
    """Whether a payout of these books made a transfer, or may have: nonces of long ago have no names."""
    payout_id = ledger.state.nonces.get(str(out.nonce))
    if payout_id is None:
        return out.nonce < ledger.state.chain_ms - KEPT_MS
    planned = await ledger.result(f"{payout_id}:planned")
    assert planned is not None, "the nonce is that of a payout"
    payout = planned.entry.transfer
    assert isinstance(payout, PayoutPlanned | WithdrawalPlanned | RevenueTaken), "the id says so"
    return (payout.address, payout.lamports) == (out.address, out.lamports)
