"""A signature proves a receipt or a withdrawal, and nothing that was changed since."""

import json
from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account

from azu.auth.signatures import (
    Withdrawal,
    is_signed,
    sealed,
    sign_certificate,
    sign_withdrawal,
    verify_receipt,
)
from azu.errors import InvalidRequest
from tests.builders import BOB, receipt, receipt_signed

SIGNER = Account.from_key("0x" + "09" * 32)
STRANGER = Account.from_key("0x" + "0a" * 32)
KEY = Account.from_key("0x" + "0b" * 32).address.lower()


def document(signer: Any = SIGNER) -> dict[str, Any]:
    given = receipt()
    body = sealed(given, SIGNER.address.lower(), receipt_signed(signer, given))
    # As it may come from a file, in another order.
    loaded = json.loads(json.dumps(body))
    return dict(sorted(loaded.items(), reverse=True))


def test_a_signed_receipt_names_the_platform_that_certified_its_key() -> None:
    assert verify_receipt(document()) == SIGNER.address.lower()


@pytest.mark.parametrize(
    "change",
    [
        {"charged_lamports": 1},
        {"completion_tokens": 7},
        {"worker_lamports": {}},
        {"topology": []},
        {"note": "paid"},
        {"signer": STRANGER.address.lower()},
        {"signature": "0x" + "11" * 65},
        {"signature": "0x00"},
        {"signature": None},
        {"key": STRANGER.address.lower()},
        {"key": None},
        {"certificate": sign_certificate(STRANGER, KEY)},
        {"certificate": None},
        {"signer": None},
    ],
)
def test_a_receipt_that_was_changed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        verify_receipt(document() | change)


@pytest.mark.parametrize(
    "name", ["charged_lamports", "transfer_id", "token_layers", "signer", "key", "signature"]
)
def test_a_receipt_without_one_of_its_fields_is_refused(name: str) -> None:
    short = document()
    del short[name]
    with pytest.raises(InvalidRequest):
        verify_receipt(short)


def test_a_receipt_signed_by_a_key_that_the_platform_did_not_certify_is_refused() -> None:
    given, platform = receipt(), SIGNER.address.lower()
    own = receipt_signed(STRANGER, given, by=STRANGER)
    stolen = replace(own, certificate=receipt_signed(SIGNER, given).certificate)
    for signature in (own, stolen):
        with pytest.raises(InvalidRequest, match="certify"):
            verify_receipt(sealed(given, platform, signature))


ALICE = Account.from_key("0x" + "07" * 32)
MALLORY = Account.from_key("0x" + "08" * 32)
PLATFORM = "0x" + "99" * 20
ASKED = Withdrawal(
    address=ALICE.address.lower(), lamports=5_000_000, nonce=1_790_000_000_000_000_000, expires_at_ms=9
)


def test_a_withdrawal_is_signed_by_its_own_address() -> None:
    assert is_signed(ASKED, PLATFORM, sign_withdrawal(ALICE, ASKED, PLATFORM))


@pytest.mark.parametrize(
    "change",
    [{"lamports": 5_000_001}, {"address": BOB}, {"nonce": 1}, {"expires_at_ms": 10}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_withdrawal_is_not_signed(change: dict[str, object]) -> None:
    signature = sign_withdrawal(ALICE, ASKED, PLATFORM)
    assert not is_signed(replace(ASKED, **change), PLATFORM, signature)  # type: ignore[arg-type]


def test_a_signature_for_another_platform_or_by_another_address_does_not_count() -> None:
    assert not is_signed(ASKED, "0x" + "98" * 20, sign_withdrawal(ALICE, ASKED, PLATFORM))
    assert not is_signed(ASKED, PLATFORM, sign_withdrawal(MALLORY, ASKED, PLATFORM))


@pytest.mark.parametrize("signature", ["", "0x", "zz", "0x" + "00" * 65, "0x" + "ff" * 65])
def test_a_malformed_signature_does_not_count(signature: str) -> None:
    assert not is_signed(ASKED, PLATFORM, signature)
