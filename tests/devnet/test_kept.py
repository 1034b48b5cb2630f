"""A devnet that is started again with its file is the same chain."""

from pathlib import Path

import pytest
from eth_account import Account

from azu.devnet.chain import HYPE, USDC, DevnetState, parse_exchange
from azu.devnet.kept import KeptChain
from azu.errors import ConfigurationError
from azu.money.chain.actions import sign_noop, sign_send_asset
from azu.money.chain.networks import network_at

NETWORK = network_at("http://127.0.0.1:1")
NOW_MS = 1_790_000_000_000
ALICE, BOB = (Account.from_key(f"0x{number:064x}") for number in (1, 2))
A, B = ALICE.address.lower(), BOB.address.lower()


def facts(chain: DevnetState) -> object:
    balances = [(chain.balance(one, token), chain.exists(one)) for one in (A, B) for token in (HYPE, USDC)]
    return balances, chain.txs, dict(chain.rows), dict(chain.requests_used), chain.last_ms


def changed(path: Path) -> KeptChain:
    chain = KeptChain(path)
    chain.fund(A, HYPE, 1_000, NOW_MS)
    chain.fund(A, USDC, 10**9, NOW_MS)
    chain.send_from_contract("0x" + "cc" * 20, B, HYPE, 7, 2, NOW_MS + 1)
    for number, late_ms in ((0, 0), (0, 0), (1, 500)):
        action = sign_send_asset(ALICE, NETWORK, destination=B, lamports=10, nonce=NOW_MS + number)
        chain.execute(*parse_exchange(action.body), NOW_MS + 10 + number, rows_late_ms=late_ms)
    chain.execute(*parse_exchange(sign_noop(ALICE, NETWORK, nonce=NOW_MS + 2).body), NOW_MS + 20)
    return chain


def test_the_same_chain_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "devnet.jsonl"
    before = changed(path)
    assert before.balance(B, HYPE) == 34

    after = KeptChain(path)

    assert facts(after) == facts(before)
    again = sign_noop(ALICE, NETWORK, nonce=NOW_MS + 2)
    assert after.execute(*parse_exchange(again.body), NOW_MS + 30)["status"] == "err", "the nonce is used"
    after.fund(A, HYPE, 1, NOW_MS + 40)
    assert facts(KeptChain(path)) == facts(after)


def test_a_last_line_that_was_cut_is_dropped_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "devnet.jsonl"
    before = facts(changed(path))
    with path.open("a") as file:
        file.write('["fund", "0x')
    assert facts(KeptChain(path)) == before
    assert facts(KeptChain(path)) == before

    path.write_text(path.read_text().replace('"fund"', '"found"', 1))
    with pytest.raises(ConfigurationError, match=r"devnet\.jsonl is damaged"):
        KeptChain(path)


def test_a_new_chain_repeats_no_hash(tmp_path: Path) -> None:
    first, second = changed(tmp_path / "first.jsonl"), changed(tmp_path / "second.jsonl")
    assert not first.txs.keys() & second.txs.keys()
