"""A withdrawal is signed for one amount, address, nonce, end and platform, and for nothing else."""

from dataclasses import replace

import pytest
from eth_account import Account

from azu.auth.withdrawals import Withdrawal, is_signed, sign_withdrawal
from tests.builders import BOB

ALICE = Account.from_key("0x" + "07" * 32)
MALLORY = Account.from_key("0x" + "08" * 32)
PLATFORM = "0x" + "99" * 20
ASKED = Withdrawal(
    address=ALICE.address.lower(), lamports=5_000_000, nonce=1_790_000_000_000_000_000, expires_at_ms=9
)


def test_what_its_address_signed_is_signed() -> None:
    assert is_signed(ASKED, PLATFORM, sign_withdrawal(ALICE, ASKED, PLATFORM))


@pytest.mark.parametrize(
    "change",
    [{"lamports": 5_000_001}, {"address": BOB}, {"nonce": 1}, {"expires_at_ms": 10}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_withdrawal_is_not_signed(change: dict[str, object]) -> None:
    signature = sign_withdrawal(ALICE, ASKED, PLATFORM)
    assert not is_signed(replace(ASKED, **change), PLATFORM, signature)  # type: ignore[arg-type]


def test_it_is_not_signed_for_another_platform_or_by_another_address() -> None:
    assert not is_signed(ASKED, "0x" + "98" * 20, sign_withdrawal(ALICE, ASKED, PLATFORM))
    assert not is_signed(ASKED, PLATFORM, sign_withdrawal(MALLORY, ASKED, PLATFORM))


@pytest.mark.parametrize("signature", ["", "0x", "zz", "0x" + "00" * 65, "0x" + "ff" * 65])
def test_what_is_no_signature_signs_nothing(signature: str) -> None:
    assert not is_signed(ASKED, PLATFORM, signature)
