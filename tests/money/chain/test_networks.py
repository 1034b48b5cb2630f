import pytest

from azu.errors import ConfigurationError
from azu.money.chain.networks import DEVNET_HYPE, network_at


@pytest.mark.parametrize(
    ("url", "name", "explorer", "hype"),
    [
        (
            "https://api.hyperliquid.xyz",
            "mainnet",
            "https://rpc.hyperliquid.xyz/explorer",
            "HYPE:0x0d01dc56dcaaca66ad901c959b4011ec",
        ),
        (
            "https://api.hyperliquid-testnet.xyz/",
            "testnet",
            "https://rpc.hyperliquid-testnet.xyz/explorer",
            "HYPE:0x7317beb7cceed72ef0b346074cc8e7ab",
        ),
        ("http://127.0.0.1:3001/", "devnet", "http://127.0.0.1:3001/explorer", DEVNET_HYPE),
        ("http://chain.test/base/", "devnet", "http://chain.test/base/explorer", DEVNET_HYPE),
    ],
)
def test_the_url_decides_which_token_counts(url: str, name: str, explorer: str, hype: str) -> None:
    network = network_at(url)

    assert (network.name, network.explorer_url, network.hype) == (name, explorer, hype)
    assert network.is_mainnet == (name == "mainnet")
    assert not network.api_url.endswith("/")


@pytest.mark.parametrize("url", ["", "127.0.0.1:3001", "ftp://chain.test", "http://api.hyperliquid.xyz"])
def test_a_text_that_is_no_url_of_a_chain_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        network_at(url)
