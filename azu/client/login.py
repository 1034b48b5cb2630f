"""A wallet's signature under the network's challenge."""

from urllib.parse import urlsplit

from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

from azu.errors import InvalidRequest

_WANTS = " wants you to sign in with your Ethereum account:"


def wallet_of(key: str | LocalAccount) -> LocalAccount:
    """Return the wallet of a private key in hex, or the wallet itself."""
    if isinstance(key, LocalAccount):
        return key
    try:
        wallet: LocalAccount = Account.from_key(key)
    except Exception:
        # The library's own message may quote the key: it must not travel on.
        raise InvalidRequest("this is no private key", param="private_key") from None
    return wallet


def sign_challenge(wallet: LocalAccount, text: str, url: str) -> str:
    """Sign a network's challenge as wallets do (EIP-191) and return the signature in hex.

    Raises InvalidRequest for a text that is no challenge (EIP-4361) of the network at `url` for this wallet:
    a network that hands on another one's challenge would get a key there.
    """
    first, _, rest = text.partition("\n")
    domain = first.removesuffix(_WANTS)
    if domain == first or not rest.startswith(f"{wallet.address}\n"):
        raise InvalidRequest("the network wants something signed that is no sign-in of this wallet")
    here = urlsplit(url).netloc
    if _loopback_as_one(domain) != _loopback_as_one(here):
        raise InvalidRequest(
            f"the network at {here} wants a sign-in at {domain}; its AZU_DOMAIN has to be {here}"
        )
    signature: str = wallet.sign_message(encode_defunct(text=text)).signature.to_0x_hex()
    return signature


def _loopback_as_one(netloc: str) -> str:
    host, colon, port = netloc.lower().rpartition(":")
    return f"127.0.0.1{colon}{port}" if host == "localhost" else netloc.lower()
