"""The chain networks that azu can use, and the exact token that counts as HYPE on each."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from azu.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class ChainNetwork:
    """One Hyperliquid network.

    `hype` is the full token id ("HYPE:0x..."): names are not unique. `is_mainnet` decides what is signed.
    """

    name: str
    api_url: str
    explorer_url: str
    hype: str
    is_mainnet: bool = False


_MAINNET = ChainNetwork(
    name="mainnet",
    api_url="https://api.hyperliquid.xyz",
    explorer_url="https://rpc.hyperliquid.xyz/explorer",
    hype="HYPE:0x0d01dc56dcaaca66ad901c959b4011ec",
    is_mainnet=True,
)
_TESTNET = ChainNetwork(
    name="testnet",
    api_url="https://api.hyperliquid-testnet.xyz",
    explorer_url="https://rpc.hyperliquid-testnet.xyz/explorer",
    hype="HYPE:0x7317beb7cceed72ef0b346074cc8e7ab",
)
# A devnet's signatures are valid on the testnet; a token id of its own makes them worthless there.
DEVNET_HYPE = "HYPE:0xde7e7de7e7de7e7de7e7de7e7de7e7de"


def network_at(url: str) -> ChainNetwork:
    """Return the network whose API is at `url`; any host but the two official ones is a devnet.

    Raises ConfigurationError for anything but an http(s) URL, and for plain http to an official host.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"{url!r} is not the URL of a chain", param="HYPERLIQUID_RPC_URL")
    for official in (_MAINNET, _TESTNET):
        if parts.hostname == urlsplit(official.api_url).hostname:
            if parts.scheme != "https":
                raise ConfigurationError(f"{official.name} is reached by https", param="HYPERLIQUID_RPC_URL")
            return official
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    return ChainNetwork(name="devnet", api_url=base, explorer_url=f"{base}/explorer", hype=DEVNET_HYPE)
