"""Withdrawals: what an address signs (EIP-712) to get its money back."""

from dataclasses import dataclass
from typing import Any

from eth_account.signers.local import LocalAccount
from pydantic import ConfigDict

from azu.auth.signatures import signer_of_data

LONGEST_LIFE_MS = 24 * 3_600_000

_FIELDS = [
    {"name": "account", "type": "address"},
    {"name": "lamports", "type": "uint256"},
    {"name": "nonce", "type": "uint256"},
    {"name": "expiresAtMs", "type": "uint256"},
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """Send `lamports` from an address's account to that same address, before `expires_at_ms`.

    A nonce is used once; the address chooses it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    address: str
    lamports: int
    nonce: int
    expires_at_ms: int

    @property
    def payout_id(self) -> str:
        """The one payout that can come of it."""
        return f"payout:{self.address}:withdrawal-{self.nonce}"


def sign_withdrawal(account: LocalAccount, withdrawal: Withdrawal, platform: str) -> str:
    """Return the account's signature, in hex, for the platform's network alone."""
    signed = account.sign_typed_data(full_message=_data(withdrawal, platform))
    signature: str = signed.signature.to_0x_hex()
    return signature


def is_signed(withdrawal: Withdrawal, platform: str, signature: str) -> bool:
    """Say whether the address itself signed this withdrawal for this platform."""
    return signer_of_data(_data(withdrawal, platform), signature) == withdrawal.address


def _data(withdrawal: Withdrawal, platform: str) -> dict[str, Any]:
    return {
        "primaryType": "Withdrawal",
        "domain": {"name": "azu", "version": "1", "verifyingContract": platform},
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "verifyingContract", "type": "address"},
            ],
            "Withdrawal": _FIELDS,
        },
        "message": {
            "account": withdrawal.address,
            "lamports": withdrawal.lamports,
            "nonce": withdrawal.nonce,
            "expiresAtMs": withdrawal.expires_at_ms,
        },
    }
