from dataclasses import replace
from typing import Any

import pytest

from azu.chain.replies import LedgerTransfer, TxDetails
from azu.treasury.deposits import SightingState, agrees, is_candidate, judge

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


def judged(error: str | None = None, **changes: Any) -> SightingState:
    details = TxDetails(hash=HASH, time_ms=1, user=ALICE, action=ACTION | changes, error=error)
    return judge(details, platform=PLATFORM, hype=HYPE).state


def test_hype_sent_to_the_platform_is_good() -> None:
    sighting = judge(TxDetails(HASH, 1, ALICE, ACTION, None), platform=PLATFORM, hype=HYPE)

    assert (sighting.state, sighting.sender, sighting.lamports) == (
        SightingState.PENDING,
        ALICE,
        500_000_000,
    )
    assert agrees(ROW, sighting)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "order"},
        {"type": "usdSend"},
        {"destination": ALICE},
        {"destination": None},
        {"destinationDex": "xyz"},
        {"token": "HYPE:0xfa15e000fa15e000fa15e000fa15e000"},
        {"token": "HYPE"},
        {"fromSubAccount": ALICE},
        {"amount": "0.000000001"},
        {"amount": "nan"},
        {"amount": None},
        {"error": "Insufficient balance for token transfer"},
    ],
)
def test_everything_else_is_rejected(changes: dict[str, Any]) -> None:
    assert judged(**changes) is SightingState.REJECTED


@pytest.mark.parametrize(
    "changes",
    [
        {"sender": PLATFORM},
        {"destination": ALICE},
        {"token_name": "USDC"},
        {"to_spot": False},
        {"hash": "0x" + "00" * 32},
    ],
)
def test_a_row_that_cannot_be_a_deposit_is_passed_over(changes: dict[str, Any]) -> None:
    assert is_candidate(ROW, PLATFORM)
    assert not is_candidate(replace(ROW, **changes), PLATFORM)


@pytest.mark.parametrize("changes", [{"sender": PLATFORM}, {"amount": "5.00000001"}, {"amount": "x"}])
def test_a_row_that_says_something_else_than_the_action_is_noticed(changes: dict[str, Any]) -> None:
    sighting = judge(TxDetails(HASH, 1, ALICE, ACTION, None), platform=PLATFORM, hype=HYPE)

    assert not agrees(replace(ROW, **changes), sighting)
