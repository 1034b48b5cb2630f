"""The treasury's process: deposits, payouts, receipts and lost reservations, until a signal stops it."""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from eth_account.signers.local import LocalAccount

from azu.errors import AzuError
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import ChainNetwork
from azu.money.ledger.redis import RedisLedger
from azu.money.treasury.deposits import DepositWatcher
from azu.money.treasury.expired_reservations import ReservationExpiry
from azu.money.treasury.payouts import (
    Payer,
    PayoutSelector,
    PayoutTimeouts,
    Threshold,
    WithdrawalPlanner,
)
from azu.money.treasury.receipts import ReceiptSigner
from azu.money.treasury.redis import EarningsClaims, RedisCursor, RedisLease, RedisOutbox
from azu.money.treasury.request_reply import DepositRequests, ReceiptRequests
from azu.money.treasury.withdrawals import RedisWithdrawals
from azu.protocol.job import Receipt
from azu.redis_client import connect_redis

_LOG = logging.getLogger(__name__)
_REQUESTS_AT_ONCE = 16
_REQUESTS_EVERY_S = 0.05
_LONGEST_PAUSE_S = 5.0


class JobRecords(Protocol):
    """What the treasury needs of the durable jobs. It is a port because jobs are a higher floor than money.

    Both methods raise Unavailable when Redis does not answer.
    """

    async def receipt(self, job_id: str) -> Receipt | None:
        """Return the receipt of a job that has ended, None for every other id."""

    async def give_up(self, job_id: str) -> bool:
        """Mark a job as lost, so that it is never written later; return False if it was written before."""


@dataclass(frozen=True, slots=True)
class TreasuryConfig:
    """What the treasury runs with. `account` holds the platform's key: nothing prints it.

    `poll_s` is the time between two polls of the chain; after `lease_s` a signer that died no longer blocks
    the next one.
    """

    redis_url: str = field(repr=False)
    network: ChainNetwork
    account: LocalAccount = field(repr=False)
    threshold: Threshold
    timeouts: PayoutTimeouts = field(default_factory=PayoutTimeouts)
    poll_s: float = 5.0
    plan_every_s: float = 60.0
    sweep_every_s: float = 30.0
    max_open_payouts: int = 20
    lease_s: float = 30.0


async def run(config: TreasuryConfig, jobs: JobRecords, *, ready: Callable[[], None]) -> None:
    """Run until SIGTERM or SIGINT; call `ready` once, after the platform's ledger on the chain was read.

    The process waits for a chain or a Redis that is away; every other error ends it.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    treasury = _Treasury(config, jobs)
    try:
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(_every(config.poll_s, treasury.watch, ready)),
                tasks.create_task(_every(_REQUESTS_EVERY_S, treasury.answer_deposits)),
                tasks.create_task(_every(_REQUESTS_EVERY_S, treasury.sign_receipts)),
                tasks.create_task(_every(config.poll_s, treasury.pay)),
                tasks.create_task(_every(config.sweep_every_s, treasury.sweep)),
            ]
            await stop.wait()
            for loop_task in loops:
                loop_task.cancel()
    finally:
        await treasury.close()


class _Treasury:
    """The parts over one chain and one Redis, and what each loop does."""

    def __init__(self, config: TreasuryConfig, jobs: JobRecords) -> None:
        platform = config.account.address.lower()
        self._config = config
        self._redis = connect_redis(config.redis_url)
        self._chain = ChainClient(config.network)
        self._ledger = RedisLedger(self._redis)
        self._deposits = DepositRequests(self._redis)
        self._cursor = RedisCursor(self._redis)
        self._outbox = RedisOutbox(self._redis)
        self._lease = RedisLease(self._redis, ttl_ms=round(config.lease_s * 1000))
        self._watcher = DepositWatcher(self._chain, self._ledger, self._cursor, platform=platform)
        claims = EarningsClaims(self._redis, platform)
        self._selector = PayoutSelector(self._chain, self._ledger, claims, platform, config.threshold)
        withdrawals = RedisWithdrawals(self._redis)
        self._withdrawal_planner = WithdrawalPlanner(
            withdrawals, self._ledger, self._outbox, self._selector, platform=platform
        )
        self._payer = Payer(
            self._chain,
            self._ledger,
            self._outbox,
            withdrawals,
            config.account,
            config.timeouts,
            on_refused=self._selector.pass_over,
        )
        self._expiry = ReservationExpiry(self._ledger, jobs.give_up)
        self._receipts = ReceiptRequests(self._redis)
        self._receipt_signer = ReceiptSigner(jobs.receipt, self._ledger, config.account)
        self._plan_at_s = 0.0

    async def watch(self) -> None:
        await self._watcher.poll()

    async def answer_deposits(self) -> None:
        waiting = await self._deposits.waiting(_REQUESTS_AT_ONCE)
        await _all(self._answer(tx_hash) for tx_hash in waiting)

    async def sign_receipts(self) -> None:
        waiting = await self._receipts.waiting(_REQUESTS_AT_ONCE)
        await _all(self._sign(job_id) for job_id in waiting)

    async def pay(self) -> None:
        if not await self._lease.hold():
            return
        await self._payer.advance()
        since_ms, max_open = await self._cursor.read(), self._config.max_open_payouts
        await self._withdrawal_planner.plan(max_open, since_ms)
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._plan_at_s:
            self._plan_at_s = now_s + self._config.plan_every_s
            open_lamports = {payout.address: payout.lamports for payout in await self._outbox.open()}
            await self._payer.plan(await self._selector.select(open_lamports, max_open), since_ms)

    async def sweep(self) -> None:
        await self._expiry.sweep()

    async def close(self) -> None:
        try:
            await self._lease.release()
        except AzuError as error:
            _LOG.warning("the signer's lease was not released and expires later: %s", error)
        await self._chain.close()
        await self._redis.aclose()

    async def _answer(self, tx_hash: str) -> None:
        await self._deposits.answer(tx_hash, await self._watcher.check(tx_hash))

    async def _sign(self, job_id: str) -> None:
        await self._receipts.answer(job_id, await self._receipt_signer.sign(job_id))


async def _all(answers: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run every answer to its end, then raise the first error."""
    for outcome in await asyncio.gather(*answers, return_exceptions=True):
        if outcome is not None:
            raise outcome


async def _every(
    period_s: float, work: Callable[[], Awaitable[None]], done_once: Callable[[], None] | None = None
) -> None:
    """Do the work until it is cancelled; pause longer after each failure of the chain or Redis."""
    task = asyncio.current_task()
    assert task is not None
    pause_s = period_s
    # A library that gets a cancellation together with an answer may swallow the cancellation.
    while not task.cancelling():
        try:
            await work()
        except AzuError as error:
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            _LOG.warning("%s waits for %.1f s: %s", work.__name__, pause_s, error)
        else:
            pause_s = period_s
            if done_once is not None:
                done_once()
                done_once = None
        await asyncio.sleep(pause_s)
