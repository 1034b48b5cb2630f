import asyncio
import json
from pathlib import Path

import pytest
from eth_account import Account

from azu.errors import ChainError, ConfigurationError, InvalidRequest
from azu.money.chain import wallet
from azu.money.chain.api import ChainClient
from azu.units import LAMPORTS_PER_HYPE
from tests.few import few
from tests.money.chain.running import RunningDevnet


def test_a_wallet_opens_with_its_password_alone(tmp_path: Path) -> None:
    file = tmp_path / "home" / "wallet.json"

    created = wallet.create(file, "correct horse")

    assert file.stat().st_mode & 0o777 == 0o600
    assert created.key.hex() not in file.read_text()
    assert wallet.load(file, "correct horse").address == created.address
    with pytest.raises(ConfigurationError, match="has another password"):
        wallet.load(file, "battery staple")


def test_a_wallet_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "wallet.json"
    file.write_text("{}")

    with pytest.raises(ConfigurationError, match="never overwritten"):
        wallet.create(file, "secret")

    assert file.read_text() == "{}"


def test_a_wallet_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "wallet.json"
    file.write_text("{}")
    file.chmod(0o640)

    with pytest.raises(ConfigurationError, match="0600"):
        wallet.load(file, "secret")


def test_an_error_names_a_missing_or_damaged_wallet(tmp_path: Path) -> None:
    file = tmp_path / "wallet.json"
    with pytest.raises(ConfigurationError, match="no wallet"):
        wallet.load(file, "secret")
    file.write_text("{}")
    file.chmod(0o600)
    with pytest.raises(ConfigurationError, match="damaged"):
        wallet.load(file, "secret")


def test_a_wallet_that_was_changed_is_damaged_whatever_the_password(tmp_path: Path) -> None:
    file = tmp_path / "wallet.json"
    wallet.import_key(file, b"\x07" * 32, "secret")
    contents = json.loads(file.read_text())
    contents["crypto"]["mac"] = "00" * 32
    file.write_text(json.dumps(contents))

    with pytest.raises(ConfigurationError, match="is damaged: put a copy"):
        wallet.address_of(file)


def test_a_wallet_of_another_program_opens_and_its_error_leaves_both_open(tmp_path: Path) -> None:
    file = tmp_path / "wallet.json"
    file.write_text(json.dumps(Account.encrypt("0x" + "07" * 32, "secret", kdf="pbkdf2", iterations=2)))
    file.chmod(0o600)

    assert wallet.load(file, "secret").key == b"\x07" * 32
    with pytest.raises(ConfigurationError, match="damaged, or the password is wrong"):
        wallet.load(file, "another")


def test_a_bad_key_is_not_repeated_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wallet.import_key(tmp_path / "wallet.json", b"\x07" * 31, "secret")

    assert "07" not in str(caught.value)
    assert not (tmp_path / "wallet.json").exists()


@pytest.mark.parametrize(
    "kind",
    few(["reply_dropped_after", "reply_dropped_before", "rate_limited", "server_error_after", "rows_late"]),
)
def test_a_transfer_arrives_once_under_every_fault(devnet: RunningDevnet, kind: str, bob: str) -> None:
    account = Account.create()
    devnet.fund(account.address, 10 * LAMPORTS_PER_HYPE)
    devnet.fault(kind, times=2, seconds=0.5)

    tx_hash = wallet.transfer_hype(account, bob, LAMPORTS_PER_HYPE, chain_url=devnet.url)

    assert [row["hash"] for row in devnet.info("userNonFundingLedgerUpdates", bob, startTime=0)] == [tx_hash]
    assert devnet.info("spotClearinghouseState", bob)["balances"][0]["total"] == "1.0"


def test_what_an_address_holds_is_read_from_the_chain(devnet: RunningDevnet, bob: str) -> None:
    assert wallet.balance_of(bob, chain_url=devnet.url) == 0
    devnet.fund(bob, 3 * LAMPORTS_PER_HYPE + 7)

    assert wallet.balance_of(bob, chain_url=devnet.url) == 3 * LAMPORTS_PER_HYPE + 7


def test_a_refused_transfer_says_why(devnet: RunningDevnet, bob: str) -> None:
    account = Account.create()
    devnet.fund(account.address, 1)

    with pytest.raises(ChainError, match="Insufficient balance"):
        wallet.transfer_hype(account, bob, 2, chain_url=devnet.url)


@pytest.mark.prove
def test_the_error_for_an_empty_wallet_says_to_send_hype_first(devnet: RunningDevnet, bob: str) -> None:
    with pytest.raises(ChainError, match="send HYPE to it first"):
        wallet.transfer_hype(Account.create(), bob, 1, chain_url=devnet.url)


def test_a_transfer_of_the_whole_balance_is_found(devnet: RunningDevnet, bob: str) -> None:
    account = Account.create()
    devnet.fund(account.address, 5)

    async def scenario() -> str:
        chain = ChainClient(devnet.network)
        try:
            await wallet.send_hype(chain, account, bob, 3)
            return await wallet.send_hype(chain, account, bob, 2)
        finally:
            await chain.close()

    assert asyncio.run(scenario()) == devnet.txs(account.address)[0]["hash"]


@pytest.mark.parametrize("lamports", [0, -1])
def test_an_amount_below_one_lamport_is_refused(lamports: int, bob: str) -> None:
    with pytest.raises(InvalidRequest):
        wallet.transfer_hype(Account.create(), bob, lamports, chain_url="http://127.0.0.1:9")
