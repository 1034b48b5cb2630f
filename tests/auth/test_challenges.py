"""A challenge is answered once, by the wallet that it is for, with a signature that proves a key's record."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct

from azu.auth.challenges import RedisChallenges, parse_checksummed_address
from azu.auth.key_records import ApiKey, key_record_is_signed, new_secret, secret_digest
from azu.errors import InvalidRequest, Unauthenticated, Unavailable
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
Scenario = Callable[[RedisChallenges], Awaitable[None]]


@pytest.fixture
def play(redis_url: str) -> Callable[[Scenario], None]:
    async def run(scenario: Scenario) -> None:
        redis = connect_redis(redis_url)
        try:
            await asyncio.wait_for(scenario(RedisChallenges(redis, PLATFORM, random.Random(1).randbytes)), 20)
        finally:
            await redis.aclose()

    return lambda scenario: asyncio.run(run(scenario))


def sign(message: str, wallet=WALLET) -> str:
    return wallet.sign_message(encode_defunct(text=message)).signature.to_0x_hex()


def test_a_signed_challenge_gives_the_signed_record_of_its_key(play) -> None:
    async def scenario(challenges: RedisChallenges) -> None:
        digest = secret_digest(new_secret(SECRETS.randbytes(32)))
        made = await challenges.challenge(
            WALLET.address, digest, DOMAIN, NOW_MS, label="laptop", spend_limit_lamports=500
        )

        key = await challenges.answered(made.nonce, sign(made.message), NOW_MS)

        assert (key.digest, key.address, key.label, key.created_at_ms) == (digest, ADDRESS, "laptop", NOW_MS)
        assert key.spend_limit_lamports == 500
        assert key_record_is_signed(key, PLATFORM)

    play(scenario)


def test_a_key_that_would_have_ended_is_refused(play) -> None:
    async def scenario(challenges: RedisChallenges) -> None:
        with pytest.raises(InvalidRequest, match="ended"):
            await challenges.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS, expires_at_ms=NOW_MS)

    play(scenario)


def test_a_challenge_opens_one_key_for_many_requests_at_once(play) -> None:
    async def scenario(challenges: RedisChallenges) -> None:
        made = await challenges.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS)
        signature = sign(made.message)
        tries = [challenges.answered(made.nonce, signature, NOW_MS) for _ in range(50)]
        results = await asyncio.gather(*tries, return_exceptions=True)

        assert sum(isinstance(result, ApiKey) for result in results) == 1
        assert sum(isinstance(result, Unauthenticated) for result in results) == 49

    play(scenario)


def test_a_wrong_signature_uses_up_the_challenge(play) -> None:
    async def scenario(challenges: RedisChallenges) -> None:
        made = await challenges.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS)
        with pytest.raises(Unauthenticated):
            await challenges.answered(made.nonce, sign(made.message, STRANGER), NOW_MS)
        with pytest.raises(Unauthenticated, match="unknown, used or expired"):
            await challenges.answered(made.nonce, sign(made.message), NOW_MS)

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
    async def scenario(challenges: RedisChallenges) -> None:
        made = await challenges.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS)
        with pytest.raises(Unauthenticated):
            await challenges.answered(made.nonce, signature, NOW_MS)

    play(scenario)


def test_a_challenge_expires_after_five_minutes(play) -> None:
    async def scenario(challenges: RedisChallenges) -> None:
        early, late = [await challenges.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS) for _ in range(2)]
        assert 295 <= await challenges._redis.ttl(f"azu:auth:challenge:{late.nonce}") <= 300
        await challenges.answered(early.nonce, sign(early.message), NOW_MS + FIVE_MINUTES_MS - 1)
        with pytest.raises(Unauthenticated):
            await challenges.answered(late.nonce, sign(late.message), NOW_MS + FIVE_MINUTES_MS)

    play(scenario)


def test_a_redis_that_is_away_is_unavailable() -> None:
    async def scenario() -> None:
        challenges = RedisChallenges(connect_redis("redis://127.0.0.1:9/0"), PLATFORM)
        with pytest.raises(Unavailable):
            await challenges.challenge(ADDRESS, DIGEST, DOMAIN, NOW_MS)

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
