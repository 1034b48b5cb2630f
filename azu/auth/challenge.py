"""The text that a wallet signs to open a key: EIP-4361, so that wallets show it as a sign-in."""

from dataclasses import dataclass
from datetime import UTC, datetime

from eth_utils.address import (
    is_checksum_address,
    is_checksum_formatted_address,
    is_hex_address,
    to_checksum_address,
)

from azu.errors import InvalidRequest

CHALLENGE_TTL_S = 300
_STATEMENT = "Open an azu API key. It can spend this address's balance at azu; it cannot withdraw it."
# Any chain would do: nothing is sent to one. Every wallet knows this one.
_CHAIN_ID = 1


@dataclass(frozen=True, slots=True)
class Challenge:
    """A text to sign as it is, and the nonce that names it."""

    nonce: str
    message: str


def checked_address(address: str) -> str:
    """Return an address in lower case; raises InvalidRequest for a malformed one or a wrong checksum."""
    if not is_hex_address(address) or not address.startswith("0x"):
        raise InvalidRequest(f"{address!r} is not an address of 0x and 40 hex digits", param="address")
    if is_checksum_formatted_address(address) and not is_checksum_address(address):
        raise InvalidRequest(f"{address} has a wrong checksum: check its spelling", param="address")
    return address.lower()


def challenge_text(address: str, domain: str, nonce: str, now_ms: int) -> str:
    """Return the EIP-4361 message for an address to sign within CHALLENGE_TTL_S.

    `domain` is the ingress's host and port as the user sees them.
    """
    return "\n".join((
        f"{domain} wants you to sign in with your Ethereum account:",
        to_checksum_address(address),
        "",
        _STATEMENT,
        "",
        f"URI: https://{domain}",
        "Version: 1",
        f"Chain ID: {_CHAIN_ID}",
        f"Nonce: {nonce}",
        f"Issued At: {_timestamp(now_ms)}",
        f"Expiration Time: {_timestamp(now_ms + CHALLENGE_TTL_S * 1000)}",
    ))  # fmt: skip


def _timestamp(time_ms: int) -> str:
    moment = datetime.fromtimestamp(time_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
