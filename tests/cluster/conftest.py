"""One network for all cluster tests: the demo's, started once."""

import os
from collections.abc import Iterator

import pytest

from azu.chain.wallet import transfer_hype
from azu.cli.network.local_network import LocalNetwork, demo_network
from azu.units import LAMPORTS_PER_HYPE
from tests.cluster.user import User, log_in

DEPOSIT_LAMPORTS = LAMPORTS_PER_HYPE


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    """The demo's network, with both built-in models deployed, the dense one first."""
    # Nothing here may reach the Hub: an id that is not on this machine is unknown.
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with demo_network(tmp_path_factory.mktemp("azu"), print) as running:
            user = paying_user(running, "warm-up")
            for model in ("azu/tiny-dense", "azu/tiny-moe"):
                body = {"model": model, "prompt": "Hello", "max_tokens": 1}
                user.http.post("/v1/completions", json=body).raise_for_status()
            yield running
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]


@pytest.fixture(scope="session")
def user(network: LocalNetwork) -> User:
    """A user who has deposited 1 HYPE."""
    return paying_user(network, "user")


@pytest.fixture(scope="session")
def other_user(network: LocalNetwork) -> User:
    """Another user who has deposited 1 HYPE."""
    return paying_user(network, "other")


@pytest.fixture
def poor_user(network: LocalNetwork) -> User:
    """A user who has deposited nothing."""
    return log_in(network.url, "poor")


def paying_user(network: LocalNetwork, label: str) -> User:
    """Make a user, move 1 HYPE to the platform and claim the deposit."""
    user = log_in(network.url, label)
    network.fund(user.address, 2 * DEPOSIT_LAMPORTS)
    tx_hash = transfer_hype(
        user.account, network.platform_address, DEPOSIT_LAMPORTS, chain_url=network.chain_url
    )
    body = {"tx_sig": tx_hash, "user_address": user.address}
    credited = user.http.post("/deposit", json=body).raise_for_status().json()
    assert credited["lamports"] == DEPOSIT_LAMPORTS
    return user.with_deposit(tx_hash)
