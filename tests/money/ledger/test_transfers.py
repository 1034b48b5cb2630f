"""Every transfer that can be constructed is well formed, and has one text."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from azu.errors import JournalFault, LedgerError
from azu.money.ledger import transfers
from azu.money.ledger.journal import Line, read_line
from azu.money.ledger.transfers import Deposit, Reserve, Settle, Transfer, encode_transfer
from azu.units import MAX_LAMPORTS
from tests.builders import ALICE, OWNERS
from tests.money.ledger import moves

ONE_OF_EACH: list[Transfer] = [
    moves.deposit(MAX_LAMPORTS),
    moves.reserve("job-1", 0),
    moves.settle("job-1", 100, w0=40, w1=40),
    moves.release("job-1"),
    moves.expire("job-1"),
    moves.plan_payout("p1", 1),
    moves.plan_withdrawal("p2", 1),
    moves.paid("p1", fee_lamports=3),
    moves.refused("p1"),
]


def decode_transfer(text: str) -> Transfer:
    """Return the transfer with this text, as the journal reads it."""
    return read_line(Line(1, f'{{"number":1,"at_ms":1,"transfer":{text},"legs":[]}}', "")).transfer


@pytest.mark.parametrize("transfer", ONE_OF_EACH, ids=lambda transfer: transfer.kind)
def test_a_transfer_is_the_same_after_encoding_and_decoding(transfer: Transfer) -> None:
    assert decode_transfer(encode_transfer(transfer)) == transfer


def test_amounts_beyond_a_double_stay_exact_in_a_text() -> None:
    assert decode_transfer(encode_transfer(moves.deposit(MAX_LAMPORTS - 1))) == moves.deposit(
        MAX_LAMPORTS - 1
    )


def test_the_order_of_shares_does_not_matter() -> None:
    one = moves.settle("job-1", 100, w0=40, w1=40)
    other = moves.settle("job-1", 100, w1=40, w0=40)
    assert one == other
    assert encode_transfer(one) == encode_transfer(other)


def test_a_transfer_keeps_its_shares_when_the_caller_changes_the_mapping() -> None:
    shares = {OWNERS[0]: 80}
    transfer = Settle(id="s", job_id="j", charged_lamports=100, platform_lamports=20, shares=shares)
    shares[OWNERS[0]] = 90
    assert transfer.shares == {OWNERS[0]: 80}


@pytest.mark.parametrize("lamports", [0, -1, MAX_LAMPORTS + 1, 1.0, True, "1", None])
def test_a_deposit_of_anything_but_a_whole_positive_amount_is_refused(lamports: Any) -> None:
    with pytest.raises(LedgerError):
        Deposit(id="d", address=ALICE, lamports=lamports, at_ms=1)


@pytest.mark.parametrize("id_", ["", " ", "a b", "a\n", "é", "x" * 201])
def test_an_id_has_to_be_short_and_printable(id_: str) -> None:
    with pytest.raises(LedgerError):
        Deposit(id=id_, address=ALICE, lamports=1, at_ms=1)


@pytest.mark.parametrize(
    ("tokens", "expires_at_ms"),
    [(-1, 0), (1, -1), (1, 2**53 + 1), (1, 1.5), (1, None), (MAX_LAMPORTS + 1, 0)],
)
def test_a_reservation_out_of_range_is_refused(tokens: int, expires_at_ms: Any) -> None:
    with pytest.raises(LedgerError):
        moves.reserve("j", tokens, expires_at_ms=expires_at_ms)


def test_a_reservation_is_of_the_most_that_its_tokens_cost() -> None:
    values = {
        "id": "reserve:j", "address": ALICE, "job_id": "j", "expires_at_ms": 1, "key_id": "k",
        "model_id": "m", "revision": "r", "num_layers": 80, "lamports_per_token_layer": 2,
        "platform_percent": 20, "prompt_tokens": 60, "max_tokens": 40,
    }  # fmt: skip
    assert Reserve(**values).lamports == 16_000
    assert Reserve(**values).price_of(1) == 160
    for bad in (
        {"num_layers": -1},
        {"num_layers": 1025},
        {"platform_percent": 101},
        {"prompt_tokens": True},
        {"model_id": "m" * 600},
    ):
        with pytest.raises(LedgerError):
            Reserve(**values | bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: moves.settle("job-1", 100, w0=101),
        lambda: Settle(
            id="s", job_id="j", charged_lamports=100, platform_lamports=20, shares={OWNERS[0]: 79}
        ),
        lambda: Settle(id="s", job_id="j", charged_lamports=100, platform_lamports=20, shares={"0xAB": 80}),
    ],
)
def test_a_settlement_that_does_not_add_up_is_refused(make: Callable[[], Settle]) -> None:
    with pytest.raises(LedgerError):
        make()


@pytest.mark.parametrize(
    "change", [{"kind": "gift"}, {"lamports": "5"}, {"lamports": 5.0}, {"note": "hello"}, {"address": "0xAB"}]
)
def test_a_text_that_is_no_transfer_is_refused(change: dict[str, Any]) -> None:
    content = json.loads(encode_transfer(moves.deposit(5))) | change
    with pytest.raises(JournalFault):
        decode_transfer(json.dumps(content))


CONSTRUCTORS = [
    transfers.user_available,
    transfers.user_reserved,
    transfers.user_withdrawing,
    transfers.worker_earned,
    transfers.worker_paying,
    transfers.worker_paid,
]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize(
    "address", ["", "0x", ALICE.upper(), ALICE[:-1], ALICE + "0", ALICE[2:], ALICE + "\n"]
)
def test_an_account_needs_a_lower_case_address(constructor: object, address: str) -> None:
    assert callable(constructor)
    with pytest.raises(LedgerError):
        constructor(address)


def test_all_accounts_are_recognised_and_distinct() -> None:
    names = [*(constructor(ALICE) for constructor in CONSTRUCTORS), transfers.CHAIN, transfers.PLATFORM]
    assert len(set(names)) == len(names)
    assert all(transfers.is_account(name) for name in names)


@pytest.mark.parametrize(
    "name", ["", "chain2", "bank", f"user:{ALICE}:earned", f"worker:{ALICE}", "user:0x1:paid"]
)
def test_other_names_are_not_recognised_as_accounts(name: str) -> None:
    assert not transfers.is_account(name)


def test_only_the_chain_and_paid_amounts_are_outside() -> None:
    inside = [transfers.PLATFORM, *(constructor(ALICE) for constructor in CONSTRUCTORS[:-1])]
    assert not any(transfers.is_outside(account) for account in inside)
    assert transfers.is_outside(transfers.CHAIN)
    assert transfers.is_outside(transfers.worker_paid(ALICE))
