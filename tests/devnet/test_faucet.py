"""A devnet's faucet pays each address that asks; other chains have no faucet."""

import pytest

from azu.devnet.faucet import fund
from azu.errors import ChainError, ConfigurationError
from azu.launch.processes import free_port
from tests.money.chain.running import RunningDevnet


def test_the_funded_address_has_the_money(devnet: RunningDevnet, bob: str) -> None:
    tx_hash = fund(devnet.url, bob, 25_000_000)

    # The faucet also gives what activates an account.
    assert tx_hash in {row["hash"] for row in devnet.info("userNonFundingLedgerUpdates", bob, startTime=0)}
    assert devnet.info("spotClearinghouseState", bob)["balances"][0]["total"] == "0.25"


def test_a_chain_without_a_faucet_gives_none(devnet: RunningDevnet, bob: str) -> None:
    with pytest.raises(ConfigurationError, match="no play money"):
        fund(f"{devnet.url}/another", bob, 1)


def test_the_error_names_a_chain_that_does_not_answer(bob: str) -> None:
    with pytest.raises(ChainError, match="did not answer"):
        fund(f"http://127.0.0.1:{free_port()}", bob, 1)
