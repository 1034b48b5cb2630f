"""The chain and the treasury beside a network: the configured ones, or a devnet with play money."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from azu.cli.network.children import Children
from azu.cli.network.ports import free_port
from azu.cli.network.processes import Command
from azu.cli.private_file import write_private
from azu.config import Settings
from azu.errors import ConfigurationError
from azu.treasury.environment import take_variable

DEVNET = "devnet"
TREASURY = "treasury"
# What they print once they are.
DEVNET_READY = r"^devnet ready "
TREASURY_READY = r"^treasury ready$"
_DEVNET_FILE = "devnet.json"
_KEY = "SCHEDULER_PRIVATE_KEY"
_KEY_FILE = "AZU_PRIVATE_KEY_FILE"


@dataclass(frozen=True, slots=True)
class Chain:
    """Where the chain is, who the platform is there, and how its treasury finds the platform's key."""

    url: str
    platform_address: str
    is_devnet: bool
    treasury_key: Mapping[str, str] = field(repr=False)


def choose_chain(settings: Settings) -> Chain:
    """Return the configured chain, or a devnet on a free port whose platform key is made here once.

    The key of a configured chain is not looked at, only handed to the treasury; either way it is gone from
    this process's environment. Raises ConfigurationError when it or the platform's address is missing.
    """
    taken = {name: take_variable(os.environ, name) for name in (_KEY, _KEY_FILE)}
    if settings.chain_url is None:
        return _devnet(settings)
    key = {name: value for name, value in taken.items() if value is not None}
    if settings.platform_address is None or not key:
        raise ConfigurationError(f"a chain needs HYPERLIQUID_ADDRESS, and {_KEY} or {_KEY_FILE}")
    return Chain(settings.chain_url, settings.platform_address, is_devnet=False, treasury_key=key)


def start_devnet(children: Children, chain: Chain) -> None:
    """Start the devnet; it may not answer yet, see DEVNET_READY."""
    port = str(urlsplit(chain.url).port)
    children.start(Command(DEVNET, _azu("devnet", "--port", port), dict(os.environ), restart=True))


def start_treasury(children: Children, settings: Settings, chain: Chain, redis_url: str) -> None:
    """Start the treasury, the only process that gets the platform's key."""
    redis = urlsplit(redis_url)
    environment = dict(os.environ) | {
        "HYPERLIQUID_RPC_URL": chain.url,
        "HYPERLIQUID_ADDRESS": chain.platform_address,
        "REDIS_HOST": redis.hostname or "",
        "REDIS_PORT": str(redis.port),
        "AZU_HOME": str(settings.home),
        "AZU_NETWORK": str(settings.network or ""),
        "AZU_REDIS_TLS": str(redis.scheme == "rediss"),
        **chain.treasury_key,
    }
    if redis.scheme != "rediss":
        environment.pop("AZU_REDIS_CA", None)
    if redis.password:
        environment |= {"REDIS_USERNAME": redis.username or "", "REDIS_PASSWORD": unquote(redis.password)}
    children.start(Command(TREASURY, _azu("treasury"), environment, restart=True))


def devnet_of(home: Path) -> Chain | None:
    """Return the devnet that a network of this home folder started last; None if there was none."""
    try:
        known = json.loads((home / _DEVNET_FILE).read_text())
    except FileNotFoundError:
        return None
    return Chain(known["url"], known["platform_address"], is_devnet=True, treasury_key={})


def _devnet(settings: Settings) -> Chain:
    from eth_account import Account

    # A key of its own: what is signed for a devnet is valid on the testnet too.
    path = settings.home / "devnet.key"
    if not path.exists():
        write_private(path, Account.create().key.hex())
    address = Account.from_key(path.read_text()).address.lower()
    url = f"http://127.0.0.1:{free_port()}"
    write_private(settings.home / _DEVNET_FILE, json.dumps({"url": url, "platform_address": address}))
    return Chain(url, address, is_devnet=True, treasury_key={_KEY_FILE: str(path)})


def _azu(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "azu.cli", *arguments)
