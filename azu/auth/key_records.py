"""What an API key is, and the text by which its owner's wallet opens it: the signature proves the record.

The client makes the key's secret, and the network gets the secret's hash alone.
"""

import base64
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from urllib.parse import quote

from eth_utils.address import to_checksum_address
from pydantic import ConfigDict

from azu.auth.signatures import signer_of_text
from azu.units import hype_from_lamports

CHALLENGE_TTL_S = 300
SECRET_BYTES = 32
_PREFIX = "azu-sk-"
_KEY_ID_DIGITS = 16
# Any chain would do: nothing is sent to it. Every wallet knows this one.
_CHAIN_ID = 1
_WANTS = " wants you to sign in with your Ethereum account:"
_NONCE = "Nonce: "


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A bearer key of an address. `digest` is the SHA-256 of its secret in hex; azu never has the secret.

    `text` is what the address's wallet signed to open the key, `signature` that signature in hex.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    key_id: str
    digest: str
    address: str
    label: str
    created_at_ms: int
    expires_at_ms: int | None = None
    spend_limit_lamports: int | None = None
    text: str = field(default="", repr=False)
    signature: str = field(default="", repr=False)


def new_secret(random_bytes: bytes) -> str:
    """Return SECRET_BYTES random bytes as a bearer secret."""
    assert len(random_bytes) == SECRET_BYTES, "a secret is as long as its hash"
    return _PREFIX + base64.urlsafe_b64encode(random_bytes).decode().rstrip("=")


def secret_digest(secret: str) -> str:
    """Return the hash by which a key is known."""
    return sha256(secret.encode()).hexdigest()


def key_id_of(digest: str) -> str:
    """Return a key's public name."""
    return f"key-{digest[:_KEY_ID_DIGITS]}"


def key_text(key: ApiKey, platform: str, domain: str, nonce: str) -> str:
    """Return the EIP-4361 message that the key's address signs to open it within CHALLENGE_TTL_S.

    `platform` is the platform's address; `domain` is the ingress's host and port as the user sees them.
    """
    # A wallet shows one line of plain characters here; the label may hold others.
    named = f' "{quote(key.label, safe=" ")}"' if key.label else ""
    limit = key.spend_limit_lamports
    spends = "all" if limit is None else f"up to {hype_from_lamports(limit)} HYPE"
    ends = "for ever" if key.expires_at_ms is None else f"until {_timestamp(key.expires_at_ms)}"
    return "\n".join((
        f"{domain}{_WANTS}",
        to_checksum_address(key.address),
        "",
        f"Open the API key{named} with SHA-256 {key.digest} at the azu platform {platform}. "
        f"It can spend {spends} of this address's balance there {ends}; it cannot withdraw.",
        "",
        f"URI: https://{domain}",
        "Version: 1",
        f"Chain ID: {_CHAIN_ID}",
        f"{_NONCE}{nonce}",
        f"Issued At: {_timestamp(key.created_at_ms)}",
        f"Expiration Time: {_timestamp(key.created_at_ms + CHALLENGE_TTL_S * 1000)}",
    ))  # fmt: skip


def is_key_text(text: str, key: ApiKey, platform: str) -> bool:
    """Whether a text opens this key, and nothing else, at the platform; for any domain and nonce."""
    try:
        return text == key_text(key, platform, domain_of(text), _nonce_of(text))
    except (ValueError, OverflowError, OSError):  # no address, or no time that a text can name
        return False


def key_record_is_signed(key: ApiKey, platform: str) -> bool:
    """Whether the key's address itself signed every field of the record, for this platform."""
    return (
        key.key_id == key_id_of(key.digest)
        and is_key_text(key.text, key, platform)
        and signer_of_text(key.text, key.signature) == key.address
    )


def domain_of(text: str) -> str:
    """Return the domain that an EIP-4361 message is for; empty if it is no such message."""
    domain, wants, _ = text.partition("\n")[0].partition(_WANTS)
    return domain if wants else ""


def _nonce_of(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith(_NONCE)]
    return lines[0].removeprefix(_NONCE) if lines else ""


def _timestamp(time_ms: int) -> str:
    moment = datetime.fromtimestamp(time_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
