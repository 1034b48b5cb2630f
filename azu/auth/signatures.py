"""Who signed a text or typed data."""

from collections.abc import Mapping
from typing import Any

from eth_account import Account
from eth_account.messages import SignableMessage, encode_defunct, encode_typed_data
from eth_keys.exceptions import BadSignature

_SIGNATURE_BYTES = 65


def signer_of_text(text: str, signature: str) -> str | None:
    """Return the address, in lower case, that signed a text as wallets do (EIP-191).

    `signature` is in hex. None if it is no signature; any other recovers to some address.
    """
    return _signer(encode_defunct(text=text), signature)


def signer_of_data(data: Mapping[str, Any], signature: str) -> str | None:
    """Return the address, in lower case, that signed typed data (EIP-712); None as above."""
    return _signer(encode_typed_data(full_message=dict(data)), signature)


def _signer(message: SignableMessage, signature: str) -> str | None:
    try:
        raw = bytes.fromhex(signature.removeprefix("0x"))
        if len(raw) != _SIGNATURE_BYTES:
            return None
        signer: str = Account.recover_message(message, signature=raw)
    except (ValueError, BadSignature):
        return None
    return signer.lower()
