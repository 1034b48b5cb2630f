"""A real treasury process that kills itself, with SIGKILL, before or after its n-th effect.

Arguments: Redis URL, chain URL, the threshold in lamports, the effect's number (0: never) and "before" or
"after". The key comes from the environment, as the treasury's own.
"""

import asyncio
import os
import signal
import sys
from typing import Any

from azu.chain.client import ChainClient
from azu.chain.tokens import network_at
from azu.ledger.redis import RedisLedger
from azu.treasury.claims import RedisClaims
from azu.treasury.dues import Threshold
from azu.treasury.keys import take_private_key
from azu.treasury.payouts import Patience
from azu.treasury.process import TreasuryConfig, run
from azu.treasury.redis import RedisOutbox

EFFECTS = (
    (RedisLedger, "apply"),
    (RedisClaims, "answer"),
    (RedisOutbox, "add"),
    (RedisOutbox, "next_nonce"),
    (RedisOutbox, "replace"),
    (RedisOutbox, "remove"),
    (ChainClient, "post_action"),
)


def arm(at: int, after: bool) -> None:
    effects = 0

    def armed(original: Any) -> Any:
        async def effect(*arguments: Any) -> Any:
            nonlocal effects
            effects += 1
            last = effects == at
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = await original(*arguments)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return effect

    for owner, name in EFFECTS:
        setattr(owner, name, armed(getattr(owner, name)))


def main() -> None:
    redis_url, chain_url, threshold, at, when = sys.argv[1:]
    arm(int(at), when == "after")
    config = TreasuryConfig(
        redis_url=redis_url,
        network=network_at(chain_url),
        account=take_private_key(os.environ),
        threshold=Threshold(int(threshold), int(threshold)),
        patience=Patience(conclude_ms=3_000),
        poll_s=0.05,
        plan_every_s=0.1,
        lease_s=0.5,
    )
    asyncio.run(run(config, ready=lambda: print("treasury ready", flush=True)))


if __name__ == "__main__":
    main()
