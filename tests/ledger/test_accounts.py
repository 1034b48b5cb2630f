"""Accounts have one spelling, and nothing but that spelling is an account."""

import pytest

from azu.errors import LedgerError
from azu.ledger import accounts
from tests.builders import ALICE

CONSTRUCTORS = [
    accounts.user_available,
    accounts.user_reserved,
    accounts.user_withdrawing,
    accounts.worker_earned,
    accounts.worker_paying,
    accounts.worker_paid,
]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize(
    "address", ["", "0x", ALICE.upper(), ALICE[:-1], ALICE + "0", ALICE[2:], ALICE + "\n"]
)
def test_no_account_is_made_for_what_is_no_lower_case_address(constructor: object, address: str) -> None:
    assert callable(constructor)
    with pytest.raises(LedgerError):
        constructor(address)


def test_every_account_made_is_recognised_and_distinct() -> None:
    names = [*(constructor(ALICE) for constructor in CONSTRUCTORS), accounts.CHAIN, accounts.PLATFORM]
    assert len(set(names)) == len(names)
    assert all(accounts.is_account(name) for name in names)


@pytest.mark.parametrize(
    "name", ["", "chain2", "bank", f"user:{ALICE}:earned", f"worker:{ALICE}", "user:0x1:paid"]
)
def test_other_names_are_no_accounts(name: str) -> None:
    assert not accounts.is_account(name)


def test_only_the_chain_and_what_was_paid_out_stand_outside() -> None:
    inside = [accounts.PLATFORM, *(constructor(ALICE) for constructor in CONSTRUCTORS[:-1])]
    assert not any(accounts.is_outside(account) for account in inside)
    assert accounts.is_outside(accounts.CHAIN)
    assert accounts.is_outside(accounts.worker_paid(ALICE))
