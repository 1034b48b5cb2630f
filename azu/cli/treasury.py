"""`azu treasury`: the process that holds the platform's key."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

    from azu.config import Settings


# Creating an account on the chain costs the platform a dollar, so its first payout has to be larger.
_NEW_ACCOUNT_FACTOR = 4
_DEVNET_POLL_S = 0.2


def treasury() -> None:
    """Credit deposits and pay workers until stopped; the only process that reads the platform's private key.

    The key comes from SCHEDULER_PRIVATE_KEY or the file that AZU_PRIVATE_KEY_FILE names, the chain from
    HYPERLIQUID_RPC_URL, the books from REDIS_HOST, REDIS_PORT and REDIS_PASSWORD.
    """
    import asyncio
    import os
    from dataclasses import replace

    from azu.config import Settings, load_network
    from azu.errors import ConfigurationError
    from azu.jobs.redis import RedisJobs
    from azu.logs import start_logging
    from azu.money.chain.networks import network_at
    from azu.money.treasury.payouts import Threshold
    from azu.money.treasury.platform_key import take_private_key
    from azu.money.treasury.process import TreasuryConfig, run

    account = take_private_key(os.environ)
    settings = Settings.from_environment()
    if settings.chain_url is None or settings.redis_url is None:
        raise ConfigurationError("the treasury needs HYPERLIQUID_RPC_URL and REDIS_HOST")
    if settings.platform_address not in (None, account.address.lower()):
        raise ConfigurationError("HYPERLIQUID_ADDRESS is not the address of the treasury's key")
    threshold = load_network(settings.network).policy.payout_threshold_lamports
    config = TreasuryConfig(
        redis_url=settings.redis_url,
        network=network_at(settings.chain_url),
        account=account,
        threshold=Threshold(threshold, _NEW_ACCOUNT_FACTOR * threshold),
    )
    if config.network.name == "devnet":
        # The official networks count requests; a local chain does not.
        config = replace(config, poll_s=_DEVNET_POLL_S, plan_every_s=1.0)
    start_logging("treasury", hidden=_secrets(account, settings))
    jobs = RedisJobs.from_url(settings.redis_url)
    asyncio.run(run(config, jobs, ready=lambda: print("treasury ready", flush=True)))  # noqa: T201


def _secrets(account: "LocalAccount", settings: "Settings") -> "list[str]":
    """Return the secrets of this process that no log line may contain."""
    password = settings.redis_password
    return [account.key.hex(), *([password.get_secret_value()] if password else [])]
