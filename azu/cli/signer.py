"""`azu signer`: the process that holds the platform's key."""

_DEVNET_LOOK_S = 1.0


def signer() -> None:
    """Sign payouts until stopped; the only process that reads the platform's private key.

    The key comes from the file that AZU_PRIVATE_KEY_FILE names, or for a local chain from
    SCHEDULER_PRIVATE_KEY; the chain from HYPERLIQUID_RPC_URL, the admins from AZU_ADMIN_ADDRESSES, limits
    from the network file. `azu up` sets AZU_BOOKS_URL, and writes to AZU_HOME who may call the signer.
    """
    import asyncio
    import os
    from dataclasses import replace

    from azu.config import Settings, load_network
    from azu.errors import ConfigurationError
    from azu.launch.processes import end_with_parent
    from azu.launch.sidecars import BOOKS_URL, SIGNER_MEMORY, payout_limit, platforms_in, signer_access
    from azu.logs import start_logging
    from azu.money.chain.networks import network_at
    from azu.money.signer.platform_key import take_private_key
    from azu.money.signer.policy import SigningRules
    from azu.money.signer.process import SignerConfig, run
    from azu.money.signer.views import PayoutKind
    from azu.money.treasury.environment import hide_memory, take_variable

    hide_memory()
    end_with_parent()
    account = take_private_key(os.environ)
    books_url, settings = take_variable(os.environ, BOOKS_URL), Settings.from_environment()
    if settings.chain_url is None or not books_url:
        raise ConfigurationError("the signer needs HYPERLIQUID_RPC_URL and AZU_BOOKS_URL")
    address = account.address.lower()
    if settings.platform_address != address:
        raise ConfigurationError("HYPERLIQUID_ADDRESS is not the address of the signer's key")
    network = network_at(settings.chain_url)
    limits = load_network(settings.network).policy.payout_limits
    access = signer_access(settings.home)
    config = SignerConfig(
        account,
        network,
        books_url,
        SigningRules(
            {
                PayoutKind.WITHDRAWAL: payout_limit(limits.withdrawals),
                PayoutKind.EARNINGS: payout_limit(limits.earnings),
            },
            frozenset(settings.admin_addresses),
            platforms_in(settings.home, address),
        ),
        access,
        settings.home / SIGNER_MEMORY,
    )
    if network.name == "devnet":
        # The official networks count requests; a local chain does not.
        config = replace(config, look_s=_DEVNET_LOOK_S)
    start_logging("signer", hidden=[account.key.hex(), *access.secrets.values()])
    asyncio.run(run(config, ready=lambda: print("signer ready", flush=True)))  # noqa: T201
