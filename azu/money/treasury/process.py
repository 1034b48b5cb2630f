"""The treasury's process: deposits and payouts, until a signal stops it."""

import asyncio
import logging
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from azu.clock import SteadyClock
from azu.errors import AzuError, InternalError
from azu.metrics import Meter
from azu.money.books import Books
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import ChainNetwork
from azu.money.signer.calls import RemoteSigner
from azu.money.signer.views import PayoutKind
from azu.money.treasury.deposits import DepositWatcher
from azu.money.treasury.payouts import Payer, PayoutTimeouts
from azu.money.treasury.planning import PayoutSelector, Threshold, WithdrawalPlanner, num_beside
from azu.money.treasury.redis import (
    RedisCursor,
    RedisLease,
    RedisMetrics,
    RedisOutbox,
    RedisUncredited,
)
from azu.money.treasury.request_reply import DepositRequests
from azu.money.treasury.survey import Survey
from azu.money.treasury.withdrawals import RedisWithdrawals
from azu.redis_client import connect_redis
from azu.supervision import Supervisor

_LOG = logging.getLogger(__name__)
_REQUESTS_AT_ONCE = 16
# For each the treasury asks the chain, which counts that. A deposit is credited without a request too.
_REQUESTS_A_SECOND = 4
_REQUESTS_EVERY_S = 0.05
_METRICS_EVERY_S = 1.0
# The chain counts requests.
_SURVEY_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class TreasuryConfig:
    """What the treasury runs with. It has no key: the signer at `signer_url` signs its payouts.

    `platforms` are the platform's address and those that it had before. `poll_s` is the time between two
    polls of the chain; after `lease_s` a treasury that died no longer blocks the next one. Requests of the
    ingress come, and metrics go, through the Redis at `jobs_redis_url`, else through the other. In `home`
    lie what it watches: the disk, and when copies and audits were made.
    """

    redis_url: str = field(repr=False)
    books_url: str = field(repr=False)
    signer_url: str = field(repr=False)
    network: ChainNetwork
    platforms: tuple[str, ...]
    home: Path
    threshold: Threshold
    timeouts: PayoutTimeouts = field(default_factory=PayoutTimeouts)
    poll_s: float = 5.0
    plan_every_s: float = 60.0
    max_open_payouts: int = 20
    lease_s: float = 30.0
    jobs_redis_url: str | None = field(default=None, repr=False)


async def run(config: TreasuryConfig, *, ready: Callable[[], None]) -> None:
    """Run until SIGTERM or SIGINT; call `ready` once, after the platform's ledger on the chain was read.

    The process waits for a chain or a Redis that is away. Raises InternalError when a loop cannot go on.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    treasury = _Treasury(config, ready)
    supervisor = Supervisor("treasury", Meter(), stop.set)
    supervisor.start("deposits", treasury.watch, every_s=config.poll_s)
    supervisor.start("deposit requests", treasury.answer_deposits, every_s=_REQUESTS_EVERY_S)
    supervisor.start("payouts", treasury.pay, every_s=config.poll_s)
    supervisor.start("survey", partial(treasury.survey.show, supervisor.meter), every_s=_SURVEY_EVERY_S)
    supervisor.start("metrics", partial(treasury.show, supervisor.meter), every_s=_METRICS_EVERY_S)
    try:
        await stop.wait()
    finally:
        await supervisor.stop()
        await treasury.close()
    if not supervisor.is_healthy:
        raise InternalError("a loop of the treasury cannot go on; its log says why")


class _Treasury:
    """The parts over one chain, one Redis and the books, and what each loop does."""

    def __init__(self, config: TreasuryConfig, ready: Callable[[], None]) -> None:
        platforms = config.platforms
        self._config = config
        self._redis = connect_redis(config.redis_url)
        self._chain = ChainClient(config.network)
        self._ledger = Books(config.books_url)
        self._signer = RemoteSigner(config.signer_url)
        self._jobs_redis = connect_redis(config.jobs_redis_url or config.redis_url)
        self._deposits = DepositRequests(self._jobs_redis)
        self._cursor = RedisCursor(self._redis)
        self._metrics = RedisMetrics(self._jobs_redis)
        self._source = f"treasury-{secrets.token_hex(6)}"
        self._outbox = RedisOutbox(self._redis)
        self._lease = RedisLease(self._redis, ttl_ms=round(config.lease_s * 1000))
        clock = self._clock = SteadyClock()
        self._watcher = DepositWatcher(
            self._chain,
            self._ledger,
            self._cursor,
            RedisUncredited(self._redis),
            platform=platforms[0],
            former=platforms[1:],
            now_ms=clock,
        )
        self._selector = PayoutSelector(self._chain, self._ledger, platforms, config.threshold, now_ms=clock)
        withdrawals = RedisWithdrawals(self._redis)
        self._withdrawal_planner = WithdrawalPlanner(
            withdrawals,
            self._ledger,
            self._outbox,
            self._selector,
            self._signer,
            platforms=platforms,
            now_ms=clock,
        )
        self._payer = Payer(
            self._chain,
            self._ledger,
            self._outbox,
            withdrawals,
            self._signer,
            config.timeouts,
            platforms=platforms,
            on_refused=self._selector.pass_over,
            gives_up=self._watcher.has_left_otherwise,
            now_ms=clock,
        )
        self.survey = Survey(self._chain, self._signer, platforms, config.home)
        self._plan_at_s = 0.0
        self._ready: Callable[[], None] | None = ready

    async def _hear_time(self) -> None:
        """Have this process and the books go by the chain's time. Raises ChainError."""
        chain_ms = await self._chain.now_ms()
        self._clock.hears(chain_ms)
        await self._ledger.hear_time(chain_ms)

    async def watch(self) -> None:
        await self._hear_time()
        await self._watcher.poll()
        ready, self._ready = self._ready, None
        if ready is not None:
            ready()

    async def answer_deposits(self) -> None:
        await self._deposits.wait()
        num_requests = await self._deposits.serve(self._watcher.check, _REQUESTS_AT_ONCE)
        await asyncio.sleep(num_requests / _REQUESTS_A_SECOND)

    async def pay(self) -> None:
        if not await self._lease.hold():
            return
        await self._hear_time()
        await self._payer.advance()
        now_s = asyncio.get_running_loop().time()
        is_due = now_s >= self._plan_at_s
        if is_due:
            self._plan_at_s = now_s + self._config.plan_every_s
            await self._payer.resume(await self._ledger.open_payouts())
        # What is set aside while books and chain do not agree may have left the account already.
        if self._ready is not None or (await self._signer.status()).findings:
            return
        since_ms, max_open = await self._cursor.read(), self._config.max_open_payouts
        await self._withdrawal_planner.plan(max_open, since_ms)
        if is_due:
            open_ = await self._outbox.open()
            open_lamports = {payout.address: payout.lamports for payout in open_}
            most = max_open + num_beside(PayoutKind.EARNINGS, open_)
            await self._payer.plan(await self._selector.select(open_lamports, most), since_ms)

    async def show(self, meter: Meter) -> None:
        await self._metrics.show(self._source, meter.snapshot())

    async def close(self) -> None:
        try:
            await self._lease.release()
        except AzuError as error:
            _LOG.warning("the treasury's lease was not released and expires later: %s", error)
        await self._chain.close()
        await self._ledger.close()
        await self._signer.close()
        await self._redis.aclose()
        await self._jobs_redis.aclose()
