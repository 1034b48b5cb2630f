"""A wallet's signature under the network's challenge."""

from collections.abc import Callable

from eth_account import Account
from eth_account.messages import encode_defunct

from azu.errors import InvalidRequest


def sign_challenge(private_key: str) -> tuple[str, Callable[[str], str]]:
    """Return a key's address and a function that signs texts as wallets do (EIP-191)."""
    try:
        account = Account.from_key(private_key)
    except Exception:
        # The library's own message may quote the key: it must not travel on.
        raise InvalidRequest("this is no private key", param="private_key") from None

    def sign(text: str) -> str:
        signature: str = account.sign_message(encode_defunct(text=text)).signature.to_0x_hex()
        return signature

    return account.address, sign
