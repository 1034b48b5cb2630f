"""A receipt proves what the platform signed, and nothing that was changed since."""

import json
from typing import Any

import pytest
from eth_account import Account

from azu.auth.receipts import sealed, sign_receipt, verify_receipt
from azu.errors import InvalidRequest
from tests.builders import receipt

PLATFORM = Account.from_key("0x" + "09" * 32)
STRANGER = Account.from_key("0x" + "0a" * 32)


def document(signer: Any = PLATFORM) -> dict[str, Any]:
    given = receipt()
    body = sealed(given, PLATFORM.address.lower(), sign_receipt(signer, given))
    # As it comes out of a file, in another order.
    loaded = json.loads(json.dumps(body))
    return dict(sorted(loaded.items(), reverse=True))


def test_a_signed_receipt_names_its_signer() -> None:
    assert verify_receipt(document()) == PLATFORM.address.lower()


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
        {"signer": None},
    ],
)
def test_a_receipt_that_was_changed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        verify_receipt(document() | change)


@pytest.mark.parametrize("name", ["charged_lamports", "transfer_id", "token_layers", "signer", "signature"])
def test_a_receipt_that_lost_a_part_is_refused(name: str) -> None:
    short = document()
    del short[name]
    with pytest.raises(InvalidRequest):
        verify_receipt(short)


def test_a_receipt_signed_by_somebody_else_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        verify_receipt(document(STRANGER))
