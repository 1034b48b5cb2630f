"""A wallet's signature under the network's challenge."""

from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

from azu.errors import InvalidRequest


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


def sign_text(wallet: LocalAccount, text: str) -> str:
    """Sign a text as wallets do (EIP-191) and return the signature in hex."""
    signature: str = wallet.sign_message(encode_defunct(text=text)).signature.to_0x_hex()
    return signature
