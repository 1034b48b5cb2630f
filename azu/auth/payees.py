"""The statement by which an address claims what is earned in its name: signed once (EIP-712), good for ever.

Without it a wrong address in a node's settings would take its earnings where nobody gets them back.
"""

from typing import Any

from eth_account.signers.local import LocalAccount

from azu.auth.signatures import signer_of_data


def sign_claim(account: LocalAccount, platform: str) -> str:
    """Return the account's claim, in hex, to what it earns with the platform."""
    signed = account.sign_typed_data(full_message=_data(account.address, platform))
    signature: str = signed.signature.to_0x_hex()
    return signature


def is_claim(address: str, platform: str, signature: str) -> bool:
    """Say whether a lower-case address itself signed that it claims its earnings."""
    return signer_of_data(_data(address, platform), signature) == address


def _data(address: str, platform: str) -> dict[str, Any]:
    return {
        "primaryType": "PayoutAddress",
        "domain": {"name": "azu", "version": "1", "verifyingContract": platform},
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "verifyingContract", "type": "address"},
            ],
            "PayoutAddress": [{"name": "account", "type": "address"}],
        },
        "message": {"account": address},
    }
