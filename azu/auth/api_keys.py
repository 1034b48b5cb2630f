"""API keys in Redis, and the challenges that a wallet signs to open one.

`azu:auth:challenge:{nonce}`  JSON of the ApiKey that an open challenge is for; expires, and is deleted as it
                              is read.
`azu:auth:key:{sha256}`       JSON of the ApiKey whose secret has this hash.
`azu:auth:keys:{address}`     hash: key id -> sha256 of its secret.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from eth_utils.address import is_checksum_address, is_checksum_formatted_address
from pydantic import TypeAdapter
from redis.asyncio import Redis

from azu.addresses import parse_address
from azu.auth.key_records import (
    CHALLENGE_TTL_S,
    ApiKey,
    key_id_of,
    key_record_is_signed,
    key_text,
    secret_digest,
)
from azu.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthenticated

_NONCE_BYTES = 16
_MAX_KEYS = 100
# A key whose hash is known already stays as it is.
_ADD = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 'known' end
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[4]) then return 'full' end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3])
return ''
"""


@dataclass(frozen=True, slots=True)
class Challenge:
    """A text to sign unchanged, and the nonce that names the challenge; `key` is what the text opens."""

    nonce: str
    message: str
    key: ApiKey


_KEY = TypeAdapter(ApiKey)


class RedisAuth:
    """Opens keys for a wallet's signature, checks and revokes them. The caller passes the time."""

    def __init__(
        self, redis: Redis, platform: str, random_bytes: Callable[[int], bytes] = secrets.token_bytes
    ) -> None:
        """Open keys at the platform with this address."""
        self._redis = redis
        self._platform = platform
        self._add = redis.register_script(_ADD)
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

    async def open_key(self, nonce: str, signature: str, now_ms: int, *, max_keys: int = _MAX_KEYS) -> ApiKey:
        """Open the key of a challenge and return it.

        `signature` is the wallet's signature of the challenge's text (EIP-191), in hex. Raises
        Unauthenticated when the challenge is unknown, used or expired, or was signed by another address;
        Conflict when the key was opened before, Forbidden when the address has `max_keys` already. The
        challenge is used up in every case.
        """
        content = await self._redis.getdel(_challenge_key(nonce))
        key = None if content is None else _KEY.validate_json(cast(str, content))
        if key is None or key.created_at_ms + 1000 * CHALLENGE_TTL_S <= now_ms:
            raise Unauthenticated("this challenge is unknown, used or expired; ask for a new one")
        key = replace(key, signature=signature)
        if not key_record_is_signed(key, self._platform):
            raise Unauthenticated(f"the challenge was not signed by {key.address}")
        if not await self._store(key, max_keys):
            for old in await self.list(key.address):
                if old.expires_at_ms is not None and old.expires_at_ms <= now_ms:
                    await self.revoke(key.address, old.key_id)
            if not await self._store(key, max_keys):
                raise Forbidden(f"this address has {max_keys} keys; revoke one", code="too_many_keys")
        return key

    async def _store(self, key: ApiKey, max_keys: int) -> bool:
        """Store a key and return True, or False where its address has too many; raises Conflict."""
        names = [_address_key(key.address), _secret_key(key.digest)]
        refusal = await self._add(names, [key.key_id, key.digest, _KEY.dump_json(key), max_keys])
        if refusal == "known":
            raise Conflict(f"{key.key_id} was opened before; make a new secret", code="key_exists")
        return not refusal

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


def _secret_key(digest: str) -> str:
    return f"azu:auth:key:{digest}"


def _address_key(address: str) -> str:
    return f"azu:auth:keys:{address}"
