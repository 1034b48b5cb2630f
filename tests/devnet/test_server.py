import signal
import socket
import subprocess
import sys

import httpx
import pytest
import requests
from eth_account import Account
from eth_account.signers.local import LocalAccount
from hyperliquid.exchange import Exchange
from hyperliquid.info import Info
from hyperliquid.utils import signing
from hyperliquid.utils.error import ClientError, ServerError

from azu.devnet.chain import HYPE, SECOND_HYPE
from azu.units import LAMPORTS_PER_HYPE
from tests.money.chain.running import RunningDevnet

DEVNET = "from azu.cli.devnet import devnet; devnet(port={port})"


def start(port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DEVNET.format(port=port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_server_prints_its_url_once_it_answers_and_ends_at_sigterm() -> None:
    process = start(port=0)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().split()
        assert ready[:2] == ["devnet", "ready"]
        assert httpx.post(f"{ready[2]}/info", json={"type": "meta"}, timeout=10).json() == {"universe": []}

        process.send_signal(signal.SIGTERM)

        process.communicate(timeout=10)
    finally:
        process.kill()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(ready[2].rsplit(":", 1)[1]))) != 0


def test_the_server_does_not_start_on_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(port=taken.getsockname()[1])
        out, _ = process.communicate(timeout=30)

    assert process.returncode != 0
    assert out == ""


@pytest.fixture
def alice(devnet: RunningDevnet) -> LocalAccount:
    account = Account.create()
    devnet.fund(account.address, 10 * LAMPORTS_PER_HYPE)
    return account


@pytest.fixture
def exchange(devnet: RunningDevnet, alice: LocalAccount) -> Exchange:
    return Exchange(alice, devnet.url, timeout=5)


@pytest.fixture
def info(devnet: RunningDevnet) -> Info:
    return Info(devnet.url, skip_ws=True, timeout=5)


def hype(info: Info, address: str) -> str:
    return next((b["total"] for b in info.spot_user_state(address)["balances"] if b["coin"] == "HYPE"), "0.0")


def test_the_sdk_starts_from_the_devnets_own_metadata(info: Info, bob: str) -> None:
    assert info.name_to_coin["HYPE/USDC"] == "@107"
    assert info.user_state(bob)["withdrawable"] == "0.0"


@pytest.mark.parametrize("call", ["send_asset", "spot_transfer"])
def test_a_transfer_moves_the_amount_and_both_parties_see_it(
    exchange: Exchange, info: Info, alice: LocalAccount, call: str, bob: str
) -> None:
    if call == "send_asset":
        reply = exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "1.25")
    else:
        reply = exchange.spot_transfer("1.25", bob, HYPE.full_id)

    assert reply == {"status": "ok", "response": {"type": "default"}}
    assert (hype(info, alice.address), hype(info, bob)) == ("8.75", "1.25")
    [seen_by_bob] = info.user_non_funding_ledger_updates(bob, 0)
    assert seen_by_bob == info.user_non_funding_ledger_updates(alice.address, 0)[-1]
    assert seen_by_bob["delta"]["amount"] == "1.25"
    assert seen_by_bob["delta"]["user"] == alice.address.lower()


def test_the_first_payment_to_an_account_costs_a_dollar(
    exchange: Exchange, info: Info, devnet: RunningDevnet, bob: str
) -> None:
    assert devnet.info("preTransferCheck", bob, source=exchange.wallet.address)["fee"] == "1.0"
    for _ in range(2):
        exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "1")

    fees = [row["delta"]["fee"] for row in info.user_non_funding_ledger_updates(bob, 0)]

    assert fees == ["1.0", "0.0"]
    assert devnet.info("preTransferCheck", bob, source=exchange.wallet.address)["fee"] == "0.0"


def test_an_account_without_dollars_cannot_activate_another(
    exchange: Exchange, devnet: RunningDevnet, bob: str
) -> None:
    exchange.send_asset(bob, "spot", "spot", "USDC:0x6d1e7cde53ba9467b783cb7c530ce054", "9")

    reply = exchange.send_asset("0x" + "c0" * 20, "spot", "spot", HYPE.full_id, "1")

    assert reply["status"] == "err"
    assert "USDC" in reply["response"]


def test_a_unified_account_must_use_send_asset(exchange: Exchange, alice: LocalAccount, bob: str) -> None:
    assert exchange.user_set_abstraction(alice.address, "unifiedAccount")["status"] == "ok"

    refused = exchange.spot_transfer("1", bob, HYPE.full_id)

    assert refused["response"] == "Action disabled when unified account is active"
    assert exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "1")["status"] == "ok"


def test_more_than_the_balance_is_refused_and_uses_up_the_nonce(
    exchange: Exchange, devnet: RunningDevnet, alice: LocalAccount, bob: str
) -> None:
    reply = exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "11")

    assert reply == {"status": "err", "response": "Insufficient balance for token transfer"}
    failed = devnet.txs(alice.address)[0]
    assert failed["error"] == "Insufficient balance for token transfer"
    assert "duplicate nonce" in exchange.noop(failed["action"]["nonce"])["response"]


def test_the_same_bytes_are_executed_once(
    exchange: Exchange, info: Info, alice: LocalAccount, bob: str
) -> None:
    nonce = signing.get_timestamp_ms()
    action = {
        "type": "sendAsset",
        "destination": bob,
        "sourceDex": "spot",
        "destinationDex": "spot",
        "token": HYPE.full_id,
        "amount": "2",
        "fromSubAccount": "",
        "nonce": nonce,
    }
    signature = signing.sign_send_asset_action(alice, action, False)

    first = exchange._post_action(action, signature, nonce)
    second = exchange._post_action(action, signature, nonce)

    assert first["status"] == "ok"
    assert second == {"status": "err", "response": f"Invalid nonce: duplicate nonce {nonce}"}
    assert hype(info, bob) == "2.0"


def test_a_burned_nonce_stops_the_transfer_that_has_it(exchange: Exchange, info: Info, bob: str) -> None:
    nonce = signing.get_timestamp_ms()
    assert exchange.noop(nonce)["status"] == "ok"
    action = {
        "type": "sendAsset",
        "destination": bob,
        "sourceDex": "spot",
        "destinationDex": "spot",
        "token": HYPE.full_id,
        "amount": "2",
        "fromSubAccount": "",
        "nonce": nonce,
    }
    signature = signing.sign_send_asset_action(exchange.wallet, action, False)

    assert "duplicate nonce" in exchange._post_action(action, signature, nonce)["response"]
    assert hype(info, bob) == "0.0"


def test_a_stranger_and_a_mainnet_signature_are_refused(devnet: RunningDevnet, bob: str) -> None:
    stranger = Exchange(Account.create(), devnet.url, timeout=5)

    reply = stranger.send_asset(bob, "spot", "spot", HYPE.full_id, "1")

    assert reply["response"].startswith("Must deposit before performing actions. User: 0x")


def test_an_emptied_account_disappears_with_its_ledger(
    exchange: Exchange, info: Info, alice: LocalAccount, bob: str
) -> None:
    exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "10")
    exchange.send_asset(bob, "spot", "spot", "USDC:0x6d1e7cde53ba9467b783cb7c530ce054", "9")

    assert info.user_non_funding_ledger_updates(alice.address, 0) == []
    assert info.user_role(alice.address) == {"role": "missing"}
    assert len(info.user_non_funding_ledger_updates(bob, 0)) == 2


def test_a_page_holds_500_rows(devnet: RunningDevnet, info: Info, bob: str) -> None:
    for _ in range(502):
        devnet.fund(bob, 1)

    rows = info.user_non_funding_ledger_updates(bob, 0)

    assert len(rows) == 500
    assert rows == sorted(rows, key=lambda row: row["time"])
    assert info.user_non_funding_ledger_updates(bob, rows[-1]["time"] + 1_000) == []


@pytest.mark.parametrize(
    ("kind", "error", "executed"),
    [
        ("reply_dropped_before", requests.exceptions.RequestException, False),
        ("reply_dropped_after", requests.exceptions.RequestException, True),
        ("unprocessable", ClientError, False),
        ("rate_limited", ClientError, False),
        ("server_error_before", ServerError, False),
        ("server_error_after", ServerError, True),
    ],
)
def test_a_fault_hits_one_answer(
    devnet: RunningDevnet,
    exchange: Exchange,
    info: Info,
    kind: str,
    error: type[Exception],
    executed: bool,
    bob: str,
) -> None:
    devnet.fault(kind)

    with pytest.raises(error):
        exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "1")

    assert hype(info, bob) == ("1.0" if executed else "0.0")
    assert exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "1")["status"] == "ok"


def test_a_delay_outlasts_a_clients_timeout(devnet: RunningDevnet, alice: LocalAccount, bob: str) -> None:
    exchange = Exchange(alice, devnet.url, timeout=0.2)
    devnet.fault("delay", seconds=0.6)

    with pytest.raises(requests.exceptions.Timeout):
        exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "1")


def test_a_restart_cuts_every_connection_for_a_while(devnet: RunningDevnet, info: Info, bob: str) -> None:
    devnet.fault("restart", seconds=0.5)

    with pytest.raises(requests.exceptions.RequestException):
        info.spot_user_state(bob)


def test_rows_come_late_with_their_own_time(
    devnet: RunningDevnet, exchange: Exchange, info: Info, bob: str
) -> None:
    devnet.fault("rows_late", seconds=60)
    exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "1")
    exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "2")

    amounts = [row["delta"]["amount"] for row in info.user_non_funding_ledger_updates(bob, 0)]

    assert amounts == ["2.0"]
    assert hype(info, bob) == "3.0"


def test_rows_come_twice(devnet: RunningDevnet, exchange: Exchange, info: Info, bob: str) -> None:
    exchange.send_asset(bob, "spot", "spot", HYPE.full_id, "1")
    devnet.fault("rows_twice")

    rows = info.user_non_funding_ledger_updates(bob, 0)

    assert len(rows) == 2
    assert rows[0] == rows[1]


def test_another_token_can_be_called_hype(
    devnet: RunningDevnet, exchange: Exchange, info: Info, bob: str
) -> None:
    devnet.fault("second_hype")
    devnet.fund(exchange.wallet.address, LAMPORTS_PER_HYPE, token=SECOND_HYPE.full_id)

    exchange.send_asset(bob, "spot", "spot", SECOND_HYPE.full_id, "1")

    [row] = info.user_non_funding_ledger_updates(bob, 0)
    assert row["delta"]["token"] == "HYPE"
    assert [token["name"] for token in info.spot_meta()["tokens"]].count("HYPE") == 2
    assert devnet.txs(exchange.wallet.address)[0]["action"]["token"] == SECOND_HYPE.full_id


@pytest.mark.parametrize(
    "body", [{}, {"type": "bogus"}, {"type": "userRole"}, {"type": "txDetails", "hash": "0x0"}]
)
def test_an_unknown_request_is_unprocessable(devnet: RunningDevnet, body: dict[str, str]) -> None:
    reply = requests.post(f"{devnet.url}/info", json=body, timeout=5)

    assert reply.status_code == 422
    assert reply.text == "Failed to deserialize the JSON body into the target type"


def test_a_malformed_action_is_unprocessable(devnet: RunningDevnet, exchange: Exchange) -> None:
    with pytest.raises(ClientError) as caught:
        exchange.post("/exchange", {"action": {"type": "bogus"}, "nonce": 1, "signature": {}})

    assert caught.value.status_code == 422
