from dataclasses import replace
from typing import Any

import pytest

from azu.money.chain.port import LedgerTransfer, TxDetails
from azu.money.chain.rows import arrived, lamports_of, moved_hype, row_id

ALICE, PLATFORM = "0x" + "a1" * 20, "0x" + "0f" * 20
HYPE = "HYPE:0x7317beb7cceed72ef0b346074cc8e7ab"
HASH = "0x" + "12" * 32
ROW = LedgerTransfer(
    time_ms=1,
    hash=HASH,
    sender=ALICE,
    destination=PLATFORM,
    token_name="HYPE",
    amount="5.0",
    to_spot=True,
    nonce=7,
)
ACTION = {
    "type": "sendAsset",
    "destination": PLATFORM,
    "sourceDex": "spot",
    "destinationDex": "spot",
    "token": HYPE,
    "amount": "5",
    "fromSubAccount": "",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"sender": PLATFORM},
        {"destination": ALICE},
        {"token_name": "USDC"},
        {"to_spot": False},
    ],
)
def test_a_row_that_cannot_be_a_deposit_is_no_candidate(changes: dict[str, Any]) -> None:
    assert arrived(ROW, (PLATFORM,))
    assert not arrived(replace(ROW, **changes), (PLATFORM,))


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({}, True),
        ({"token": "HYPE:0xfa15e000fa15e000fa15e000fa15e000"}, False),
        ({"type": "multiSig", "token": None, "payload": {"action": ACTION}}, True),
        ({"type": "multiSig", "payload": {}}, None),
        ({"type": "multiSig", "payload": None}, None),
        ({"fromSubAccount": ALICE}, True),
        ({"token": None}, None),
        ({"error": "Insufficient balance"}, False),
    ],
)
def test_an_action_says_whether_it_moved_hype(changes: dict[str, Any], moved: bool | None) -> None:
    error = changes.pop("error", None)

    assert moved_hype(TxDetails(HASH, 1, ALICE, ACTION | changes, error), HYPE) is moved


def test_every_row_has_an_id_of_its_own() -> None:
    zero = "0x" + "00" * 32
    rows = [
        ROW,
        *(replace(ROW, **change) for change in ({"time_ms": 2}, {"hash": zero}, {"sender": PLATFORM})),
        *(
            replace(ROW, **change)
            for change in ({"nonce": 8}, {"nonce": None}, {"amount": "5.1"}, {"nth": 1})
        ),
    ]

    assert len({row_id(row) for row in rows}) == len(rows)
    assert row_id(ROW) == row_id(replace(ROW))
    assert all(len(row_id(row)) < 180 and " " not in row_id(row) for row in rows)


@pytest.mark.parametrize(("amount", "lamports"), [("5.0", 500_000_000), ("0.000000001", None), ("x", None)])
def test_an_amount_is_a_whole_number_of_lamports(amount: str, lamports: int | None) -> None:
    assert lamports_of(replace(ROW, amount=amount)) == lamports
