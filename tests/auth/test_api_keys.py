"""A wallet's signature opens a key, once per challenge, and the key's secret is not stored."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct

from azu.auth.api_keys import RedisAuth, parse_checksummed_address
from azu.auth.key_records import ApiKey, key_record_is_signed, new_secret, secret_digest
from azu.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthenticated, Unavailable
from azu.redis_client import connect_redis

WALLET = Account.from_key("0x" + "07" * 32)
STRANGER = Account.from_key("0x" + "08" * 32)
ADDRESS = WALLET.address.lower()
DOMAIN = "azu.example:8000"
PLATFORM = "0x" + "99" * 20
DIGEST = "ab" * 32
NOW_MS = 1_700_000_000_000
FIVE_MINUTES_MS = 300_000

SECRETS = random.Random(2)
Scenario = Callable[[RedisAuth], Awaitable[None]]


@pytest.fixture
def play(redis_url: str) -> Callable[[Scenario], None]:
    async def run(scenario: Scenario) -> None:
        redis = connect_redis(redis_url)
        try:
            await asyncio.wait_for(scenario(RedisAuth(redis, PLATFORM, random.Random(1).randbytes)), 20)
        finally:
            await redis.aclose()

    return lambda scenario: asyncio.run(run(scenario))


def sign(message: str, wallet=WALLET) -> str:
    return wallet.sign_message(encode_defunct(text=message)).signature.to_0x_hex()


async def opened(auth: RedisAuth, now_ms: int = NOW_MS, **given) -> tuple[str, ApiKey]:
    """Open a key as a client does, and return its secret with it."""
    secret = new_secret(SECRETS.randbytes(32))
    digest = secret_digest(secret)
    made = await auth.challenge(WALLET.address, digest, DOMAIN, now_ms, label="laptop", **given)
    return secret, await auth.open_key(made.nonce, sign(made.message), now_ms)


def test_a_signed_challenge_opens_a_key_that_is_recognised(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        secret, key = await opened(auth, spend_limit_lamports=500)

        assert (key.address, key.label, key.created_at_ms) == (ADDRESS, "laptop", NOW_MS)
        assert key.spend_limit_lamports == 500
        assert await auth.check(secret, NOW_MS + 1) == key
        assert key_record_is_signed(key, PLATFORM)

    play(scenario)


def test_a_hash_opens_one_key(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        secret, key = await opened(auth)
        made = await auth.challenge(STRANGER.address, key.digest, DOMAIN, NOW_MS)
        with pytest.raises(Conflict, match="opened before"):
            await auth.open_key(made.nonce, sign(made.message, STRANGER), NOW_MS)
        assert await auth.check(secret, NOW_MS) == key

    play(scenario)


def test_keys_that_ended_make_room_for_others(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        await opened(auth, expires_at_ms=NOW_MS + 1)
        for digest, at_ms in (("ab" * 32, NOW_MS), ("cd" * 32, NOW_MS + 1)):
            made = await auth.challenge(ADDRESS, digest, DOMAIN, at_ms)
            opening = auth.open_key(made.nonce, sign(made.message), at_ms, max_keys=1)
            if at_ms == NOW_MS:
                with pytest.raises(Forbidden, match="1 keys"):
                    await opening
            else:
                await opening

    play(scenario)


def test_a_key_that_would_have_ended_is_refused(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        with pytest.raises(InvalidRequest, match="ended"):
            await auth.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS, expires_at_ms=NOW_MS)

    play(scenario)


def test_the_secret_is_not_in_the_store(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        secret, _ = await opened(auth)
        redis = auth._redis
        for name in await redis.keys("*"):
            kind = await redis.type(name)
            content = await (redis.get(name) if kind == "string" else redis.hgetall(name))
            assert secret not in f"{name} {content}"
            assert secret.removeprefix("azu-sk-") not in f"{name} {content}"

    play(scenario)


def test_a_challenge_opens_one_key_for_many_requests_at_once(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        made = await auth.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS)
        signature = sign(made.message)
        tries = [auth.open_key(made.nonce, signature, NOW_MS) for _ in range(50)]
        results = await asyncio.gather(*tries, return_exceptions=True)

        assert sum(isinstance(result, ApiKey) for result in results) == 1
        assert sum(isinstance(result, Unauthenticated) for result in results) == 49
        assert len(await auth.list(ADDRESS)) == 1

    play(scenario)


def test_a_wrong_signature_uses_up_the_challenge(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        made = await auth.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS)
        with pytest.raises(Unauthenticated):
            await auth.open_key(made.nonce, sign(made.message, STRANGER), NOW_MS)
        with pytest.raises(Unauthenticated, match="unknown, used or expired"):
            await auth.open_key(made.nonce, sign(made.message), NOW_MS)
        assert await auth.list(ADDRESS) == ()

    play(scenario)


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "0x",
        "not hex",
        "0x" + "00" * 65,
        "0x" + "ff" * 65,
        "0x" + "11" * 64,
        "0x" + "11" * 66,
        "0x" + "00" * 32 + "11" * 32 + "1b",
        sign("another text"),
    ],
)
def test_other_bytes_than_a_signature_of_the_text_are_refused(play, signature: str) -> None:
    async def scenario(auth: RedisAuth) -> None:
        made = await auth.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS)
        with pytest.raises(Unauthenticated):
            await auth.open_key(made.nonce, signature, NOW_MS)

    play(scenario)


def test_a_challenge_expires_after_five_minutes(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        early, late = [await auth.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS) for _ in range(2)]
        assert 295 <= await auth._redis.ttl(f"azu:auth:challenge:{late.nonce}") <= 300
        await auth.open_key(early.nonce, sign(early.message), NOW_MS + FIVE_MINUTES_MS - 1)
        with pytest.raises(Unauthenticated):
            await auth.open_key(late.nonce, sign(late.message), NOW_MS + FIVE_MINUTES_MS)

    play(scenario)


@pytest.mark.parametrize("bearer", [None, "", "azu-sk-", "azu-sk-" + "A" * 43, "sk-proj-1", "é"])
def test_a_missing_or_unknown_key_is_refused(play, bearer: str | None) -> None:
    async def scenario(auth: RedisAuth) -> None:
        await opened(auth)
        with pytest.raises(Unauthenticated):
            await auth.check(bearer, NOW_MS)

    play(scenario)


def test_a_key_is_refused_from_its_expiry_on(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        secret, key = await opened(auth, expires_at_ms=NOW_MS + 1_000)
        assert await auth.check(secret, NOW_MS + 999) == key
        with pytest.raises(Unauthenticated, match="expired"):
            await auth.check(secret, NOW_MS + 1_000)

    play(scenario)


def test_a_revoked_key_is_refused_at_once_and_the_others_stay(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        (lost_secret, lost), (kept_secret, kept) = [await opened(auth, NOW_MS + n) for n in range(2)]
        assert await auth.list(WALLET.address) == (lost, kept)
        await auth.revoke(WALLET.address, lost.key_id)

        with pytest.raises(Unauthenticated):
            await auth.check(lost_secret, NOW_MS)
        assert await auth.check(kept_secret, NOW_MS) == kept
        assert await auth.list(ADDRESS) == (kept,)
        with pytest.raises(NotFound):
            await auth.revoke(ADDRESS, lost.key_id)

    play(scenario)


def test_an_address_cannot_revoke_the_key_of_another(play) -> None:
    async def scenario(auth: RedisAuth) -> None:
        secret, key = await opened(auth)
        with pytest.raises(NotFound):
            await auth.revoke(STRANGER.address, key.key_id)
        assert await auth.check(secret, NOW_MS) == key

    play(scenario)


def test_a_redis_that_is_away_is_unavailable() -> None:
    async def scenario() -> None:
        auth = RedisAuth(connect_redis("redis://127.0.0.1:9/0"), PLATFORM)
        with pytest.raises(Unavailable):
            await auth.check("azu-sk-x", NOW_MS)
        with pytest.raises(Unavailable):
            await auth.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS)

    asyncio.run(scenario())


OWNER = "0xfb6916095ca1df60bb79ce92ce3ea74c37c5d359"
CHECKSUMMED = "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359"


@pytest.mark.parametrize("address", [OWNER, CHECKSUMMED, "0x" + OWNER[2:].upper()])
def test_an_address_is_stored_in_lower_case(address: str) -> None:
    assert parse_checksummed_address(address) == OWNER


@pytest.mark.parametrize(
    "address",
    [
        "",
        "0x",
        OWNER[2:],
        OWNER[:-1],
        OWNER + "0",
        OWNER[:-1] + "g",
        CHECKSUMMED.replace("fB", "Fb"),  # mixed case with a wrong checksum: a typing error
        f"{OWNER}\n",
    ],
)
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_checksummed_address(address)
    assert refused.value.param == "address"
