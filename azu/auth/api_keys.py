"""API keys in Redis, and the challenges that a wallet signs to open one.

`azu:auth:challenge:{nonce}`  JSON of an open challenge; expires, and is deleted as it is read.
`azu:auth:key:{sha256}`       JSON of the ApiKey whose secret has this hash.
`azu:auth:keys:{address}`     hash: key id -> sha256 of its secret.
"""

import base64
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import cast

from eth_utils.address import (
    is_checksum_address,
    is_checksum_formatted_address,
    to_checksum_address,
)
from pydantic import ConfigDict, TypeAdapter
from redis.asyncio import Redis

from azu.addresses import parse_address
from azu.auth.signatures import signer_of_text
from azu.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated

CHALLENGE_TTL_S = 300
SECRET_BYTES = 32
_PREFIX = "azu-sk-"
_KEY_ID_DIGITS = 16
_NONCE_BYTES = 16
_MAX_KEYS = 100
_STATEMENT = "Open an azu API key. It can spend this address's balance at azu; it cannot withdraw it."
# Any chain would do: nothing is sent to it. Every wallet knows this one.
_CHAIN_ID = 1
_ADD = """
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[4]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3])
return 1
"""


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


@dataclass(frozen=True, slots=True)
class Challenge:
    """A text to sign unchanged, and the nonce that names the challenge."""

    nonce: str
    message: str


@dataclass(frozen=True, slots=True)
class _OpenChallenge:
    address: str
    message: str
    expires_at_ms: int


_OPEN_CHALLENGE = TypeAdapter(_OpenChallenge)
_KEY = TypeAdapter(ApiKey)


class RedisAuth:
    """Opens keys for a wallet's signature, checks and revokes them. The caller passes the time."""

    def __init__(self, redis: Redis, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._redis = redis
        self._add = redis.register_script(_ADD)
        self._random_bytes = random_bytes

    async def challenge(self, address: str, domain: str, now_ms: int) -> Challenge:
        """Return a text for the address to sign within five minutes; raises InvalidRequest."""
        address = parse_checksummed_address(address)
        nonce = self._random_bytes(_NONCE_BYTES).hex()
        message = challenge_text(address, domain, nonce, now_ms)
        waiting = _OpenChallenge(address, message, now_ms + CHALLENGE_TTL_S * 1000)
        await self._redis.set(_challenge_key(nonce), _OPEN_CHALLENGE.dump_json(waiting), ex=CHALLENGE_TTL_S)
        return Challenge(nonce, message)

    async def open_key(
        self,
        nonce: str,
        signature: str,
        label: str,
        now_ms: int,
        *,
        expires_at_ms: int | None = None,
        spend_limit_lamports: int | None = None,
        max_keys: int = _MAX_KEYS,
    ) -> tuple[str, ApiKey]:
        """Return the secret of a new key, which azu does not store, and the key.

        `signature` is the wallet's signature of the challenge's text (EIP-191), in hex. Raises
        Unauthenticated when the challenge is unknown, used or expired, or was signed by another address;
        Forbidden when the address has `max_keys` already. The challenge is used up in every case.
        """
        content = await self._redis.getdel(_challenge_key(nonce))
        waiting = None if content is None else _OPEN_CHALLENGE.validate_json(cast(str, content))
        if waiting is None or waiting.expires_at_ms <= now_ms:
            raise Unauthenticated("this challenge is unknown, used or expired; ask for a new one")
        if signer_of_text(waiting.message, signature) != waiting.address:
            raise Unauthenticated(f"the challenge was not signed by {waiting.address}")
        secret = new_secret(self._random_bytes(SECRET_BYTES))
        digest = secret_digest(secret)
        key = ApiKey(
            key_id=key_id_of(digest),
            address=waiting.address,
            label=label,
            created_at_ms=now_ms,
            expires_at_ms=expires_at_ms,
            spend_limit_lamports=spend_limit_lamports,
        )
        if not await self._store(digest, key, max_keys):
            for old in await self.list(key.address):
                if old.expires_at_ms is not None and old.expires_at_ms <= now_ms:
                    await self.revoke(key.address, old.key_id)
            if not await self._store(digest, key, max_keys):
                raise Forbidden(f"this address has {max_keys} keys; revoke one", code="too_many_keys")
        return secret, key

    async def _store(self, digest: str, key: ApiKey, max_keys: int) -> bool:
        keys = [_address_key(key.address), _secret_key(digest)]
        return bool(await self._add(keys, [key.key_id, digest, _KEY.dump_json(key), max_keys]))

    async def check(self, bearer: str | None, now_ms: int) -> ApiKey:
        """Return the key of a bearer secret; raises Unauthenticated without a key that is valid now."""
        if not bearer:
            raise Unauthenticated(
                "send an API key as `Authorization: Bearer azu-sk-...`; `azu login` opens one"
            )
        content = await self._redis.get(_secret_key(secret_digest(bearer)))
        key = None if content is None else _KEY.validate_json(cast(str, content))
        if key is None:
            raise Unauthenticated("this API key is unknown or revoked; `azu login` opens another")
        if key.expires_at_ms is not None and key.expires_at_ms <= now_ms:
            raise Unauthenticated("this API key has expired; `azu login` opens another")
        return key

    async def list(self, address: str) -> tuple[ApiKey, ...]:
        """Return an address's keys, expired ones too, in the order they were opened."""
        owner = _address_key(parse_checksummed_address(address))
        digests = cast(dict[str, str], await self._redis.hgetall(owner))
        if not digests:
            return ()
        found = await self._redis.mget([_secret_key(digest) for digest in digests.values()])
        # A key that is revoked at this moment may be gone from one of the two places already.
        keys = [_KEY.validate_json(cast(str, content)) for content in found if content is not None]
        return tuple(sorted(keys, key=lambda key: (key.created_at_ms, key.key_id)))

    async def revoke(self, address: str, key_id: str) -> None:
        """Make a key invalid at once; raises NotFound when the address has no such key."""
        owner = _address_key(parse_checksummed_address(address))
        digest = cast(str | None, await self._redis.hget(owner, key_id))
        if digest is None:
            raise NotFound(f"there is no key {key_id} of this address", param="key_id", code="key_not_found")
        async with self._redis.pipeline() as pipeline:
            pipeline.delete(_secret_key(digest))
            pipeline.hdel(owner, key_id)
            await pipeline.execute()


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


def parse_checksummed_address(address: str) -> str:
    """Return an address in lower case; raises InvalidRequest if it is malformed or its checksum is wrong.

    Only mixed case carries a checksum (EIP-55).
    """
    lower = parse_address(address)
    if is_checksum_formatted_address(address) and not is_checksum_address(address):
        raise InvalidRequest(f"{address} has a wrong checksum: check its spelling", param="address")
    return lower


def new_secret(random_bytes: bytes) -> str:
    """Return SECRET_BYTES random bytes as a bearer secret."""
    assert len(random_bytes) == SECRET_BYTES, "a secret is as long as its hash"
    return _PREFIX + base64.urlsafe_b64encode(random_bytes).decode().rstrip("=")


def secret_digest(secret: str) -> str:
    """Return the hash under which a key is stored."""
    return sha256(secret.encode()).hexdigest()


def key_id_of(digest: str) -> str:
    """Return a key's public name."""
    return f"key-{digest[:_KEY_ID_DIGITS]}"


def _challenge_key(nonce: str) -> str:
    return f"azu:auth:challenge:{nonce}"


def _secret_key(digest: str) -> str:
    return f"azu:auth:key:{digest}"


def _address_key(address: str) -> str:
    return f"azu:auth:keys:{address}"
