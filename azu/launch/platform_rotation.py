"""Replaces the platform's key in a home of money whose network is down."""

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from azu.auth.network_id import PLATFORMS_FILE
from azu.auth.succession import read_successions, successor_of
from azu.config import Settings
from azu.errors import ConfigurationError
from azu.launch.network_process import home_locked
from azu.launch.sidecars import SIGNER_MEMORY
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import network_at
from azu.money.signer.platform_key import read_key_file
from azu.money.signer.rotation import move, rotate


def rotated(settings: Settings, old_key: Path, new_key: Path) -> dict[str, Any]:
    """Have the key in one file replace that in another, and return what moved where.

    Where the keys were replaced before, only what came since is moved. Raises Conflict while a network runs
    in the home otherwise, ConfigurationError for a key that is not the platform's, ChainError to be tried
    again.
    """
    if settings.chain_url is None:
        raise ConfigurationError("set HYPERLIQUID_RPC_URL: the chain of `azu up` is down with its network")
    old, new = read_key_file(old_key), read_key_file(new_key)
    source, target, home = old.address.lower(), new.address.lower(), settings.money_home
    record, memory = home / PLATFORMS_FILE, home / SIGNER_MEMORY
    is_done = successor_of(source, read_successions(record)) == target

    async def run() -> int:
        chain = ChainClient(network_at(settings.chain_url or ""))
        try:
            return await (move(chain, old, target) if is_done else rotate(chain, old, new, memory, record))
        finally:
            await chain.close()

    with ExitStack() as held:
        if not is_done:
            if settings.platform_address != source:
                raise ConfigurationError(f"HYPERLIQUID_ADDRESS is not {source}, the address of {old_key}")
            held.enter_context(home_locked(settings.home))
        try:
            lamports = asyncio.run(run())
        finally:
            _give_to_owner(home, record, memory)
    return {"platform": target, "before": source, "lamports": lamports}


def _give_to_owner(home: Path, *files: Path) -> None:
    """Have the user of money own what root wrote in its home."""
    owner = home.stat()
    for file in files:
        if file.exists() and os.geteuid() == 0:
            os.chown(file, owner.st_uid, owner.st_gid)
