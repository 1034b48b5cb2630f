"""The text that a wallet signs names the whole key, so that its signature proves the record."""

import random
from dataclasses import fields, replace

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct

from azu.auth.key_records import (
    ApiKey,
    domain_of,
    key_id_of,
    key_record_is_signed,
    key_text,
    new_secret,
    secret_digest,
)

WALLET = Account.from_key("0x" + "07" * 32)
STRANGER = Account.from_key("0x" + "08" * 32)
PLATFORM = "0x" + "99" * 20
DIGEST = "0123456789abcdef" * 4
KEY = ApiKey(
    key_id=key_id_of(DIGEST),
    digest=DIGEST,
    address=WALLET.address.lower(),
    label="my laptop",
    created_at_ms=1_700_000_000_123,
    expires_at_ms=1_710_000_000_000,
    spend_limit_lamports=20_000_000,
)


def signed(key: ApiKey, wallet=WALLET, platform: str = PLATFORM) -> ApiKey:
    text = key_text(key, platform, "azu.example:8000", "00ff")
    return replace(
        key, text=text, signature=wallet.sign_message(encode_defunct(text=text)).signature.to_0x_hex()
    )


def test_the_text_is_an_eip_4361_message() -> None:
    assert key_text(KEY, PLATFORM, "127.0.0.1:8000", "0123456789abcdef") == (
        "127.0.0.1:8000 wants you to sign in with your Ethereum account:\n"
        f"{WALLET.address}\n"
        "\n"
        f'Open the API key "my laptop" with SHA-256 {DIGEST} at the azu platform {PLATFORM}. It can spend up '
        "to 0.2 HYPE of this address's balance there until 2024-03-09T16:00:00.000Z; it cannot withdraw.\n"
        "\n"
        "URI: https://127.0.0.1:8000\n"
        "Version: 1\n"
        "Chain ID: 1\n"
        "Nonce: 0123456789abcdef\n"
        "Issued At: 2023-11-14T22:13:20.123Z\n"
        "Expiration Time: 2023-11-14T22:18:20.123Z"
    )


def test_a_key_without_limit_and_end_says_so() -> None:
    free = replace(KEY, label="", expires_at_ms=None, spend_limit_lamports=None)

    text = key_text(free, PLATFORM, "azu.example", "00")

    assert f"Open the API key with SHA-256 {DIGEST}" in text
    assert "It can spend all of this address's balance there for ever; it cannot withdraw." in text


def test_a_record_that_its_owner_signed_is_proven() -> None:
    for key in (KEY, replace(KEY, expires_at_ms=None), replace(KEY, spend_limit_lamports=None, label="")):
        assert key_record_is_signed(signed(key), PLATFORM)


CHANGES = {
    "key_id": "key-fedcba9876543210",
    "digest": "fedcba9876543210" * 4,
    "address": STRANGER.address.lower(),
    "label": "other",
    "created_at_ms": KEY.created_at_ms + 1,
    "expires_at_ms": None,
    "spend_limit_lamports": None,
    "text": "I owe you 5 HYPE",
    "signature": "0x" + "11" * 65,
}


@pytest.mark.parametrize("name", [field.name for field in fields(ApiKey)])
def test_no_field_of_a_record_can_be_changed(name: str) -> None:
    assert not key_record_is_signed(replace(signed(KEY), **{name: CHANGES[name]}), PLATFORM)


def test_a_record_of_another_wallet_or_platform_is_not_proven() -> None:
    assert not key_record_is_signed(signed(KEY, STRANGER), PLATFORM)
    assert not key_record_is_signed(signed(KEY, platform="0x" + "66" * 20), PLATFORM)
    assert not key_record_is_signed(KEY, PLATFORM)


def test_odd_records_are_not_proven_and_raise_nothing() -> None:
    good = signed(KEY)
    for odd in (
        replace(good, address="0x1"),
        replace(good, expires_at_ms=10**20),
        replace(good, created_at_ms=-(10**20)),
        replace(good, text=good.text.replace("Nonce", "\u2028Nonce")),
    ):
        assert not key_record_is_signed(odd, PLATFORM)


def test_a_label_adds_no_line_and_no_quote() -> None:
    plain = key_text(KEY, PLATFORM, "azu.example", "00").count("\n")
    chance = random.Random(3)
    for _ in range(200):
        label = "".join(chance.choice('a"\n\r\u2028\u00e9 %;.') for _ in range(8))
        key = replace(KEY, label=label)
        text = key_text(key, PLATFORM, "azu.example", "00")
        assert text.count("\n") == plain
        assert len(text.splitlines()) == plain + 1
        assert text.count('"') == 2
        assert text.isascii()
        assert key_record_is_signed(signed(key), PLATFORM)


def test_only_a_sign_in_has_a_domain() -> None:
    assert domain_of(key_text(KEY, PLATFORM, "azu.example:8000", "00")) == "azu.example:8000"
    assert domain_of("I owe you 5 HYPE") == ""


def test_a_secret_is_32_random_bytes_and_its_hash_names_the_key() -> None:
    secret = new_secret(bytes(range(32)))

    assert secret.startswith("azu-sk-")
    assert len(secret) == len("azu-sk-") + 43
    assert key_id_of(secret_digest(secret)) == f"key-{secret_digest(secret)[:16]}"
