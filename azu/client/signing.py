"""What a wallet signs at a login, and nothing else that a network may send to be signed."""

from urllib.parse import urlsplit

from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

from azu.auth.key_records import ApiKey, domain_of, is_key_text
from azu.errors import InvalidRequest


def wallet_of(key: str | LocalAccount) -> LocalAccount:
    """Return the wallet of a private key in hex, or the wallet itself."""
    if isinstance(key, LocalAccount):
        return key
    try:
        wallet: LocalAccount = Account.from_key(key)
    except Exception:
        # The library's message may quote the key, so azu does not chain it.
        raise InvalidRequest("this is no private key", param="private_key") from None
    return wallet


def sign_key(wallet: LocalAccount, key: ApiKey, platform: str, url: str) -> str:
    """Sign a key's text as wallets do (EIP-191) and return the signature in hex.

    Raises InvalidRequest for a text that does not open this very key at the platform, or that is not of the
    network at `url`: another network could open a key, or a key with other limits, with the signature.
    """
    if not is_key_text(key.text, key, platform):
        raise InvalidRequest("the network sent another text to sign than the one that opens this key")
    domain, here = domain_of(key.text), urlsplit(url).netloc
    if _loopback_as_one(domain) != _loopback_as_one(here):
        raise InvalidRequest(
            f"the network at {here} sent a sign-in for {domain}: log in at that address if you know it, else "
            f"its owner has to set AZU_DOMAIN to {here}"
        )
    signature: str = wallet.sign_message(encode_defunct(text=key.text)).signature.to_0x_hex()
    return signature


def _loopback_as_one(netloc: str) -> str:
    host, colon, port = netloc.lower().rpartition(":")
    return f"127.0.0.1{colon}{port}" if host == "localhost" else netloc.lower()
