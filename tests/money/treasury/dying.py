"""A real treasury process that kills itself, with SIGKILL, before or after its n-th effect."""

import asyncio
import logging
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from azu.money.books import Books
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import network_at
from azu.money.treasury.payouts import PayoutTimeouts
from azu.money.treasury.planning import Threshold
from azu.money.treasury.process import TreasuryConfig, run
from azu.money.treasury.redis import RedisCursor, RedisLease, RedisOutbox
from azu.money.treasury.request_reply import RequestReply
from azu.money.treasury.withdrawals import RedisWithdrawals
from tests.killing import Death, kill_at_effect, start

EFFECTS = (
    (Books, "apply"),
    (RequestReply, "answer"),
    (RedisCursor, "advance"),
    (RedisLease, "hold"),
    (RedisOutbox, "add"),
    (RedisOutbox, "replace"),
    (RedisOutbox, "remove"),
    (RedisWithdrawals, "refuse"),
    (RedisWithdrawals, "take_out"),
    (ChainClient, "post_action"),
)
_NEVER = Death()


@dataclass(frozen=True)
class Treasury:
    """Where a treasury finds what it needs, its platform, and its threshold."""

    redis_url: str
    books_url: str
    signer_url: str
    chain_url: str
    platform: str
    threshold_lamports: int

    def start(self, death: Death = _NEVER) -> BaseProcess:
        """Start it; it kills itself where `death` says."""
        return start(_live, self, death)


def _live(treasury: Treasury, death: Death) -> None:
    logging.disable()
    kill_at_effect(EFFECTS, death)
    config = TreasuryConfig(
        redis_url=treasury.redis_url,
        books_url=treasury.books_url,
        signer_url=treasury.signer_url,
        network=network_at(treasury.chain_url),
        platforms=(treasury.platform,),
        home=Path.cwd(),
        threshold=Threshold(treasury.threshold_lamports, treasury.threshold_lamports),
        timeouts=PayoutTimeouts(conclude_ms=3_000),
        poll_s=0.05,
        plan_every_s=0.1,
        lease_s=0.3,
    )
    asyncio.run(run(config, ready=lambda: None))
