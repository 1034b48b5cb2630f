"""The challenges that a wallet signs to open an API key.

`azu:auth:challenge:{nonce}`  JSON of the ApiKey that an open challenge is for; expires, and is deleted as it
                              is read.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from eth_utils.address import is_checksum_address, is_checksum_formatted_address
from pydantic import TypeAdapter
from redis.asyncio import Redis

from azu.addresses import parse_address
from azu.auth.key_records import CHALLENGE_TTL_S, ApiKey, key_id_of, key_record_is_signed, key_text
from azu.errors import InvalidRequest, Unauthenticated

_NONCE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Challenge:
    """A text to sign unchanged, and the nonce that names the challenge; `key` is what the text opens."""

    nonce: str
    message: str
    key: ApiKey


_KEY = TypeAdapter(ApiKey)


class RedisChallenges:
    """Makes challenges, each to be answered once. The caller passes the time."""

    def __init__(
        self, redis: Redis, platform: str, random_bytes: Callable[[int], bytes] = secrets.token_bytes
    ) -> None:
        """Make challenges for keys at the platform with this address."""
        self._redis = redis
        self._platform = platform
        self._random_bytes = random_bytes

    async def challenge(
        self,
        address: str,
        digest: str,
        domain: str,
        now_ms: int,
        *,
        label: str = "",
        expires_at_ms: int | None = None,
        spend_limit_lamports: int | None = None,
    ) -> Challenge:
        """Return a text for the address to sign within five minutes; raises InvalidRequest.

        The text opens the key whose secret has the SHA-256 `digest`, in hex.
        """
        nonce = self._random_bytes(_NONCE_BYTES).hex()
        address = parse_checksummed_address(address)
        if expires_at_ms is not None and expires_at_ms <= now_ms:
            raise InvalidRequest("the key would have ended already", param="expires_at_ms")
        key = ApiKey(key_id_of(digest), digest, address, label, now_ms, expires_at_ms, spend_limit_lamports)
        key = replace(key, text=key_text(key, self._platform, domain, nonce))
        await self._redis.set(_challenge_key(nonce), _KEY.dump_json(key), ex=CHALLENGE_TTL_S)
        return Challenge(nonce, key.text, key)

    async def answered(self, nonce: str, signature: str, now_ms: int) -> ApiKey:
        """Return the signed record of a challenge's key, which the books have to open.

        `signature` is the wallet's signature of the challenge's text (EIP-191), in hex. Raises
        Unauthenticated when the challenge is unknown, used or expired, or was signed by another address. The
        challenge is used up in every case.
        """
        content = await self._redis.getdel(_challenge_key(nonce))
        key = None if content is None else _KEY.validate_json(cast(str, content))
        if key is None or key.created_at_ms + 1000 * CHALLENGE_TTL_S <= now_ms:
            raise Unauthenticated("this challenge is unknown, used or expired; ask for a new one")
        key = replace(key, signature=signature)
        if not key_record_is_signed(key, self._platform):
            raise Unauthenticated(f"the challenge was not signed by {key.address}")
        return key


def parse_checksummed_address(address: str) -> str:
    """Return an address in lower case; raises InvalidRequest if it is malformed or its checksum is wrong.

    Only mixed case carries a checksum (EIP-55).
    """
    lower = parse_address(address)
    if is_checksum_formatted_address(address) and not is_checksum_address(address):
        raise InvalidRequest(f"{address} has a wrong checksum: check its spelling", param="address")
    return lower


def _challenge_key(nonce: str) -> str:
    return f"azu:auth:challenge:{nonce}"
