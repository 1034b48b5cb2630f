"""API keys: what is known of one, and how its secret is written and recognised."""

import base64
from dataclasses import dataclass
from hashlib import sha256

from pydantic import ConfigDict

SECRET_BYTES = 32
_PREFIX = "azu-sk-"
_KEY_ID_DIGITS = 16


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A bearer key of an address. Only the hash of its secret is stored, and the hash names the key."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    key_id: str
    address: str
    label: str
    created_at_ms: int
    expires_at_ms: int | None = None
    spend_limit_lamports: int | None = None


def new_secret(random_bytes: bytes) -> str:
    """Write SECRET_BYTES random bytes as a bearer secret."""
    assert len(random_bytes) == SECRET_BYTES, "a secret is as long as its hash"
    return _PREFIX + base64.urlsafe_b64encode(random_bytes).decode().rstrip("=")


def secret_digest(secret: str) -> str:
    """Return the hash under which a secret is known."""
    return sha256(secret.encode()).hexdigest()


def key_id_of(digest: str) -> str:
    """Return a key's public name."""
    return f"key-{digest[:_KEY_ID_DIGITS]}"
