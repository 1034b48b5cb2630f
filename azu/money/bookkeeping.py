"""What the books do at each call: they check keys, fix prices, charge and share out, over the one ledger."""

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from azu.auth.key_records import CHALLENGE_TTL_S, ApiKey, key_id_of, key_record_is_signed, secret_digest
from azu.auth.network_id import Succession
from azu.auth.signatures import (
    MAX_WITHDRAWAL_LIFE_MS,
    AcceptLoss,
    CoverLoss,
    ReceiptSignature,
    Withdrawal,
    command_of,
    is_claim,
    is_dispute,
    is_signed,
)
from azu.auth.succession import platforms_of
from azu.clock import wall_clock_ms
from azu.errors import (
    Conflict,
    Forbidden,
    InsufficientBalance,
    InvalidRequest,
    LedgerError,
    NotFound,
    TransferConflict,
    Unauthenticated,
)
from azu.money.books import (
    NOT_PROVIDED,
    BooksCalls,
    BooksTerms,
    HeldMoney,
    JobDecision,
    JobDispute,
    KeySpending,
    NodesHeldMoney,
    ReversibleJob,
    Totals,
    TreasuryTransfer,
    UserBalance,
    WorkerEarnings,
)
from azu.money.books_view import open_payouts_of, view_of
from azu.money.chain.rows import is_sent_by
from azu.money.commands import command_id, transfer_of
from azu.money.endings import LOST, outcome_of, pack_ending
from azu.money.key_bounds import ended_keys, is_funded, unfunded_keys
from azu.money.ledger.audit import Audit
from azu.money.ledger.entry import Result
from azu.money.ledger.journal import RedisJournal
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.seals import Seals
from azu.money.ledger.state import KEPT_DAYS, KEPT_MS, BooksState
from azu.money.ledger.transfers import (
    HELD,
    PLATFORM,
    Disputed,
    EarningsClaimed,
    Expire,
    HeldPaid,
    KeyOpened,
    KeyRevoked,
    NodeEnrolled,
    PayoutPlanned,
    PlatformReplaced,
    Release,
    Reserve,
    RevenueTaken,
    Reversed,
    Settle,
    UnknownOut,
    WithdrawalPlanned,
    WriterOpened,
    is_fee,
    is_node_held,
    node_held,
    user_available,
    user_reserved,
    user_withdrawing,
    worker_earned,
    worker_paid,
    worker_paying,
)
from azu.money.model_fees import ends, fee, fee_lamports, fees, given_back, open_fees
from azu.money.pricing import divide, possible_shares
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
# The part of a charge whose work no node has shown is held under this name.
UNSHOWN = "-"
_MOST_REVERSIBLE = 1000
_ENDS = ("settle", "release", "expire")
# What the ledger says of a decision that comes too late, or too early.
_REFUSALS = ("matured", "node_removed", "not_matured", "unknown_node")


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
        # Key id -> what is being reserved for it now, in lamports.
        self._reserving = Counter[str]()
        # One model's fee at a time is set aside, or several requests at once would each find none.
        self._setting_fee = asyncio.Lock()
        # The models that may have fees set aside; None until they were looked for. Every job that is charged
        # asks, and has no time to look through all reservations.
        self._fee_models: set[str] | None = None
        self._opened_at_ms = 0
        # Why the signer signs nothing; empty while it does.
        self._unsigned: tuple[str, ...] = ()
        # Why the journal is not what was written; empty while it is.
        self._changed = ""

    async def ledger(self) -> Ledger:
        """Return the ledger, which is opened if it was not; raises Unavailable, LedgerError."""
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
        except LedgerError as error:
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
        state, digest = (await self.ledger()).state, secret_digest(bearer)
        known = state.keys.get(key_id_of(digest))
        if known is None or known.digest != digest:
            raise Unauthenticated("this API key is unknown or revoked; `azu login` opens another")
        if known.expires_at_ms is not None and known.expires_at_ms <= self._now_ms():
            raise Unauthenticated("this API key has expired; `azu login` opens another")
        return _api_key(known)

    async def open_key(self, key: ApiKey) -> None:
        ledger = await self.ledger()
        age_ms = self._now_ms() - key.created_at_ms
        if not key_record_is_signed(key, self._platform):
            raise Unauthenticated(f"the challenge was not signed by {key.address}")
        opened = KeyOpened(
            id=f"key:{key.key_id}",
            key_id=key.key_id,
            digest=key.digest,
            address=key.address,
            label=key.label,
            created_at_ms=key.created_at_ms,
            expires_at_ms=key.expires_at_ms,
            spend_limit_lamports=key.spend_limit_lamports,
            text=key.text,
            signature=key.signature,
        )
        if await ledger.result(opened.id) is None:
            # What was signed long ago may have been revoked since.
            if not -1000 * CHALLENGE_TTL_S < age_ms < 1000 * CHALLENGE_TTL_S:
                raise Unauthenticated("this challenge has expired; ask for a new one")
            await self._make_room(ledger, key.address)
        elif ledger.state.keys.get(key.key_id) is None:
            raise Conflict(f"{key.key_id} was revoked; make a new secret", code="key_exists")
        try:
            await ledger.apply(opened)
        except TransferConflict as error:
            message = f"{key.key_id} was opened before; make a new secret"
            raise Conflict(message, code="key_exists") from error

    async def _make_room(self, ledger: Ledger, address: str) -> None:
        """Drop keys that count no more, if there are as many as there may be; raises Forbidden."""
        state, most = ledger.state, self._terms.max_keys
        if sum(one.address == address for one in state.keys.values()) >= most:
            ended = ended_keys(state, address, self._now_ms())
            await self._revoke(ended)
            if not ended:
                raise Forbidden(
                    f"this address has {most} keys, which is all it may have (limits.max_keys); revoke one",
                    code="too_many_keys",
                )
        most = self._terms.max_unfunded_keys
        if not is_funded(state, address) and len(unfunded_keys(state)) >= most:
            await self.drop_unfunded_keys()
            if len(unfunded_keys(state)) >= most:
                raise Forbidden(
                    f"addresses that never had money have {most} keys, which is all they may have "
                    "(limits.max_unfunded_keys); deposit first",
                    code="too_many_unfunded_keys",
                )

    async def drop_unfunded_keys(self) -> None:
        """Revoke the keys of addresses that never had money, once they are old enough."""
        before_ms = self._now_ms() - self._terms.unfunded_key_ms
        old = [one for one in unfunded_keys((await self.ledger()).state) if one.created_at_ms <= before_ms]
        await self._revoke(old)

    async def _revoke(self, keys: Iterable[KeyOpened]) -> None:
        ledger = await self.ledger()
        for one in keys:
            await ledger.apply(KeyRevoked(id=f"revoked:{one.key_id}", key_id=one.key_id))

    async def revoke_key(self, bearer: str, key_id: str) -> None:
        mine, ledger = await self.key(bearer), await self.ledger()
        restricted = mine.expires_at_ms is not None or mine.spend_limit_lamports is not None
        if restricted and key_id != mine.key_id:
            message = "a key that expires or has a spend limit may only revoke itself"
            raise Forbidden(message, param="key_id")
        known = ledger.state.keys.get(key_id)
        if known is None or known.address != mine.address:
            raise NotFound(f"there is no key {key_id} of this address", param="key_id", code="key_not_found")
        await ledger.apply(KeyRevoked(id=f"revoked:{key_id}", key_id=key_id))

    async def keys(self, address: str) -> tuple[KeySpending, ...]:
        state = (await self.ledger()).state
        mine = [one for one in state.keys.values() if one.address == address]
        return tuple(
            KeySpending(
                _api_key(one),
                state.spent.get(one.key_id, 0),
                state.in_days(one.key_id, self._now_ms()),
            )
            for one in sorted(mine, key=lambda one: (one.created_at_ms, one.key_id))
        )

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
        key, ledger = await self.key(bearer), await self.ledger()
        if is_fee(job_id):
            raise InvalidRequest(f"{job_id} is no job's id", param="job_id")
        asked = Reserve(
            id=f"reserve:{job_id}",
            address=key.address,
            job_id=job_id,
            expires_at_ms=ledger.now_ms() + self._terms.reservation_ttl_ms,
            key_id=key.key_id,
            model_id=model_id,
            revision=revision,
            num_layers=num_layers,
            lamports_per_token_layer=self._terms.lamports_per_token_layer,
            platform_percent=self._terms.platform_percent,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )
        return await self._set_aside(key, asked)

    async def reserve_fetch(self, bearer: str, fetch_id: str, *, model_id: str, num_bytes: int) -> int:
        key, terms = await self.key(bearer), self._terms
        lamports = fee_lamports(num_bytes, terms.fetch_lamports_per_gib)
        if not is_fee(fetch_id):
            raise InvalidRequest(f"{fetch_id} is no fee's id", param="fetch_id")
        async with self._setting_fee:
            others = open_fees((await self.ledger()).state, model_id)
            if not lamports or any(one.job_id != fetch_id for one in others):
                return 0
            (await self._models_with_fees()).add(model_id)
            until_ms = self._now_ms() + terms.fetch_unused_ms
            return await self._set_aside(
                key, fee(fetch_id, key.address, key.key_id, model_id, lamports, until_ms)
            )

    async def give_fees_back(self, model_id: str) -> None:
        if model_id not in await self._models_with_fees():
            return
        async with self._setting_fee:
            for one in open_fees((await self.ledger()).state, model_id):
                await self._end(one, given_back(one))
            (await self._models_with_fees()).discard(model_id)

    async def _models_with_fees(self) -> set[str]:
        if self._fee_models is None:
            state = (await self.ledger()).state
            self._fee_models = {one.model_id for one in fees(state)}
        return self._fee_models

    async def charge_unused(self) -> None:
        """Charge the fees for models that were not used in time."""
        ledger = await self.ledger()
        for one in list(ends(ledger.state, self._now_ms())):
            await ledger.apply(one)

    async def _set_aside(self, key: ApiKey, asked: Reserve) -> int:
        ledger = await self.ledger()
        # A repeated call has another time.
        known = await ledger.result(asked.id)
        if known is None:
            with self._within_day(ledger.state, key, asked.lamports):
                await ledger.apply(asked)
            return asked.lamports
        before = known.entry.transfer
        if not isinstance(before, Reserve) or _facts(before) != _facts(asked):
            raise TransferConflict(f"{asked.job_id} was reserved for before, in another way")
        return before.lamports

    @contextmanager
    def _within_day(self, state: BooksState, key: ApiKey, lamports: int) -> Iterator[None]:
        """Raise InsufficientBalance where a key without a limit of its own would spend too much today."""
        most = self._terms.key_day_lamports
        spent = state.in_days(key.key_id, self._now_ms()) + self._reserving[key.key_id]
        if most is not None and key.spend_limit_lamports is None and spent + lamports > most:
            takes, left, limit = map(hype_from_lamports, (lamports, max(0, most - spent), most))
            raise InsufficientBalance(
                f"this may take {takes} HYPE; {left} of the {limit} HYPE that this key may spend today (UTC) "
                "are left",
                code="day_limit_reached",
            )
        self._reserving[key.key_id] += lamports
        try:
            yield
        finally:
            self._reserving[key.key_id] -= lamports
            if not self._reserving[key.key_id]:
                del self._reserving[key.key_id]

    async def give_back(self, job_id: str) -> None:
        ledger = await self.ledger()
        if (hold := ledger.state.reservations.get(job_id)) is not None:
            await self._end(hold, Release(id=f"release:{job_id}", job_id=job_id, outcome=pack_ending(LOST)))

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
        prompt_tokens = min(max(0, prompt_tokens), hold.prompt_tokens)
        completion_tokens = min(max(0, completion_tokens), hold.max_tokens)
        charged = hold.price_of(prompt_tokens + completion_tokens)
        if not charged:
            release = Release(id=f"release:{job_id}", job_id=job_id, outcome=pack_ending(ending))
            return await self._with_fees_back(await self._end(hold, release))
        division = divide(charged, hold.platform_percent, work, hold.num_layers)
        # By the terms of now: without them every settlement would read the reservation's entry.
        elapsed_ms = ledger.now_ms() - (hold.expires_at_ms - self._terms.reservation_ttl_ms)
        ran = [by_node for layer, by_node in work.items() if 0 <= layer < hold.num_layers]
        nodes = ledger.state.nodes
        speeds = {one: nodes[one].work_bytes_per_s for one in division.workers if one in nodes}
        possible = possible_shares(division.workers, ran, speeds, elapsed_ms)
        shares, held = self._payees(ledger.state, possible)
        if unshown := division.held_lamports + sum(division.workers.values()) - sum(possible.values()):
            held[UNSHOWN] += unshown
        settle = Settle(
            id=f"settle:{job_id}",
            job_id=job_id,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            charged_lamports=charged,
            platform_lamports=division.platform_lamports,
            shares=shares,
            held=held,
            by_node=division.workers,
            maturity_ms=self._terms.maturity_ms,
            outcome=pack_ending(ending),
        )
        return await self._with_fees_back(await self._end(hold, settle))

    async def _with_fees_back(self, outcome: JobOutcome) -> JobOutcome:
        """Give the model's fees back where its job was charged, or the network has no place for it."""
        if outcome.receipt.charged_lamports or (outcome.error or {}).get("code") in NOT_PROVIDED:
            await self.give_fees_back(outcome.receipt.model_id)
        return outcome

    def _payees(self, state: BooksState, by_node: Mapping[str, int]) -> tuple[Counter[str], Counter[str]]:
        """Return the shares of payout addresses, and those of nodes that have none."""
        shares, held = Counter[str](), Counter[str]()
        for node_id, lamports in by_node.items():
            node = state.nodes.get(node_id)
            payout = self._terms.others_payout if node is None else node.payout
            if payout is None:
                held[node_id] += lamports
            else:
                shares[payout] += lamports
        return shares, held

    async def _end(self, hold: Reserve, transfer: Settle | Release | Expire) -> JobOutcome:
        """Apply the end of a job; return how the job has ended, which another call may have decided."""
        try:
            await (await self.ledger()).apply(transfer)
        except (LedgerError, TransferConflict):
            if (ended := await self.ended(hold.job_id)) is None:
                raise
            return ended
        return outcome_of(hold, transfer)

    async def ended(self, job_id: str) -> JobOutcome | None:
        ledger = await self.ledger()
        reserved = await ledger.result(f"reserve:{job_id}")
        if reserved is None:
            return None
        hold = reserved.entry.transfer
        for kind in _ENDS:
            if (end := await ledger.result(f"{kind}:{job_id}")) is not None:
                transfer = end.entry.transfer
                assert isinstance(hold, Reserve), "the ids say so"
                assert isinstance(transfer, Settle | Release | Expire), "the ids say so"
                return outcome_of(hold, transfer)
        return None

    async def receipt_signature(self, job_id: str) -> ReceiptSignature | None:
        outcome = await self.ended(job_id)
        if outcome is None or self._receipts is None or await self._journal_fault():
            return None
        return self._receipts.sign(outcome.receipt)

    async def overdue(self) -> tuple[str, ...]:
        expired = (await self.ledger()).state.expired(self._now_ms())
        return tuple(hold.job_id for hold in expired if not is_fee(hold.job_id))

    async def expire(self, job_id: str) -> None:
        hold = (await self.ledger()).state.reservations.get(job_id)
        if hold is None or is_fee(job_id):
            return
        if hold.expires_at_ms > self._now_ms():
            raise Conflict(f"the reservation for {job_id} does not expire yet")
        await self._end(hold, Expire(id=f"expire:{job_id}", job_id=job_id))

    async def dispute(self, address: str, job_id: str, signature: str) -> JobDispute:
        ledger = await self.ledger()
        reserved = await ledger.result(f"reserve:{job_id}")
        hold = None if reserved is None else reserved.entry.transfer
        if not isinstance(hold, Reserve) or hold.address != address:
            raise NotFound(f"{address} paid for no job {job_id}", param="job_id", code="job_not_found")
        if not is_dispute(address, job_id, self._platform, signature):
            raise Forbidden("this dispute was not signed by the key's address", param="signature")
        if job_id in ledger.state.reservations:
            raise Conflict(f"{job_id} has not ended", code="job_not_finished")
        disputed = await ledger.result(f"disputed:{job_id}")
        if disputed is None:
            transfer = Disputed(id=f"disputed:{job_id}", job_id=job_id, signature=signature)
            with _refusals_as_conflicts():
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
        if known is None or known.payout != payout:
            self._check_num_nodes(ledger.state, payout)
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
            with _refusals_as_conflicts():
                await ledger.apply(node)
        if held := ledger.state.free(node_held(node_id)):
            paid = HeldPaid(
                id=f"held-paid:{node_id}:{ledger.head.number}", node_id=node_id, address=payout, lamports=held
            )
            await ledger.apply(paid)

    def _check_num_nodes(self, state: BooksState, payout: str) -> None:
        most = self._terms.max_nodes
        if sum(one.payout == payout for one in state.nodes.values()) >= most:
            raise Forbidden(
                f"{most} nodes are paid to this address, which is all there may be (limits.max_nodes)",
                param="payout",
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

    async def view(self, number: int, after: int, findings: tuple[str, ...] = ()) -> BooksView:
        self._unsigned = findings
        if fault := await self._journal_fault():
            raise LedgerError(fault, code="journal_fault")
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
            raise LedgerError(self._changed, code="journal_changed")
        return (await self._looked()).lost

    async def findings(self) -> tuple[str, ...]:
        fault = await self._journal_fault()
        return (fault, *self._unsigned) if fault else self._unsigned

    async def _journal_fault(self) -> str:
        """Return what is wrong with the journal, empty if nothing is."""
        try:
            lost = await self.loss()
        except LedgerError as error:
            return error.message
        return f"the ledger went back by {lost} entries" if lost else ""

    async def head(self) -> BooksHead:
        head = (await self.ledger()).head
        return BooksHead(head.number, head.hash)

    async def held(self) -> HeldMoney:
        state = (await self.ledger()).state
        nodes = (
            NodesHeldMoney(
                node_id := account.partition(":")[2],
                node.payout if (node := state.nodes.get(node_id)) else None,
                lamports,
                state.free(account),
            )
            for account, lamports in sorted(state.balances.items())
            if is_node_held(account)
        )
        disputes = (JobDispute(job, one.payer, one.lamports) for job, one in state.disputes.items())
        return HeldMoney(tuple(nodes), tuple(disputes), tuple(state.suspense.values()))

    async def reversible(self, address: str) -> tuple[ReversibleJob, ...]:
        earned, found = worker_earned(address), list[ReversibleJob]()
        for job_id, one in reversed((await self.ledger()).state.unmatured.items()):
            if address == one.payer or earned in one.accounts:
                found.append(ReversibleJob(job_id, one.payer, one.matures_at_ms, one.accounts))
            if len(found) == _MOST_REVERSIBLE:
                break
        return tuple(found)

    async def command(self, text: str) -> None:
        command = command_of(text, (self._platform,), self._terms.admins)
        if command is None:
            raise Forbidden("no admin of this network signed this command", code="no_admin")
        if isinstance(command, CoverLoss) and command_of(text, (self._platform,), {command.address}) is None:
            raise Forbidden("an admin covers a loss from his own account", param="address", code="no_admin")
        ledger = await self.ledger()
        used = await ledger.result(command_id(command))
        if used is not None and getattr(used.entry.transfer, "command", None) == text:
            return
        if used is not None:
            message = f"the nonce {command.nonce} was used before, or what the command is about has ended"
            raise Conflict(message, param="nonce", code="nonce_used")
        if command.expires_at_ms <= self._now_ms():
            raise Forbidden("this command has expired", param="expires_at_ms", code="command_expired")
        if isinstance(command, AcceptLoss) and await ledger.hash_at(command.number) != command.hash:
            message = f"the books do not have entry {command.number} as the command names it"
            raise Conflict(message, param="number")
        with _refusals_as_conflicts():
            await ledger.apply(transfer_of(command, text, ledger.state, self._now_ms()))

    async def uncredited(self) -> tuple[Uncredited, ...]:
        return await self._uncredited.all()

    async def audit(self, wallet_lamports: int | None = None, since: int = 0) -> Audit:
        return await (await self.ledger()).audit(wallet_lamports, since=since)


def totals_of(balances: Mapping[str, int], lost_writes: int = 0, revenue_left: int = 0) -> Totals:
    """Return the sums of all accounts' balances.

    Of each charge the platform's account gets one part and workers the rest, and neither gives any back: what
    workers earned stands in the accounts through which it reaches their wallets, or is held. Of the
    platform's part `revenue_left` lamports are not in the account any more.
    """
    held: Counter[str] = Counter()
    for account, lamports in balances.items():
        owner, _, rest = account.partition(":")
        if owner in ("held", "suspense"):
            held[owner] += lamports
        elif rest:
            held[f"{owner}_{rest.rpartition(':')[2]}"] += lamports
    paid = held.pop("worker_paid", 0)
    earned = held["worker_earned"] + held["worker_paying"] + held["held"] + paid
    return Totals(
        charged_lamports=earned + balances.get(PLATFORM, 0) + held["platform_paying"] + revenue_left,
        earned_lamports=earned,
        paid_lamports=paid,
        held_lamports=held,
        sum_lamports=sum(balances.values()),
        lost_writes=lost_writes,
    )


@contextmanager
def _refusals_as_conflicts() -> Iterator[None]:
    try:
        yield
    except LedgerError as error:
        if error.code not in _REFUSALS:
            raise
        raise Conflict(error.message, code=error.code) from error


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


def _api_key(opened: KeyOpened) -> ApiKey:
    return ApiKey(
        key_id=opened.key_id,
        digest=opened.digest,
        address=opened.address,
        label=opened.label,
        created_at_ms=opened.created_at_ms,
        expires_at_ms=opened.expires_at_ms,
        spend_limit_lamports=opened.spend_limit_lamports,
    )


def _facts(reserve: Reserve) -> tuple[object, ...]:
    """Return what a repeated reservation has in common with the first; the price stays that of the first."""
    return (
        reserve.address, reserve.key_id, reserve.model_id, reserve.revision, reserve.num_layers,
        reserve.prompt_tokens, reserve.max_tokens,
    )  # fmt: skip
