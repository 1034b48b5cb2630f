"""One network for all cluster tests: the demo's, started once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from azu.config import NetworkFile, load_network
from azu.launch.local_network import DEMO, LocalNetwork, demo_network
from azu.launch.redis_server import BOOKS_STORE, own_redis_url
from azu.money.chain.wallet import transfer_hype
from azu.units import LAMPORTS_PER_HYPE
from tests.network.user import User, log_in

DEPOSIT_LAMPORTS = LAMPORTS_PER_HYPE
UNUSED_KEY = "5ec12e7" * 9 + "0"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a module's own network."""
    return tmp_path_factory.mktemp("azu")


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the network takes models from."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[LocalNetwork]:
    """The demo's network, with both built-in models deployed, the dense one first."""
    with pytest.MonkeyPatch.context() as environment:
        # Nothing here may reach the Hub: an id that is not on this machine is unknown.
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("AZU_MODEL_ROOTS", str(model_root))
        # As in a shell that starts a network: no process that Ray starts may have the key.
        environment.setenv("SCHEDULER_PRIVATE_KEY", UNUSED_KEY)
        with demo_network(tmp_path_factory.mktemp("azu"), print, with_special_tokens()) as running:
            user = paying_user(running, "warm-up")
            for model in ("azu/tiny-dense", "azu/tiny-moe"):
                body = {"model": model, "prompt": "Hello", "max_tokens": 1}
                user.http.post("/v1/completions", json=body).raise_for_status()
            yield running


def with_special_tokens() -> NetworkFile:
    """Return the demo's network file for tests that send a chat, as its template writes it, as a prompt.

    A job whose client hangs up ends at once: the tests wait for its end.
    """
    demo = load_network(DEMO)
    limits = demo.policy.limits.model_copy(update={"special_tokens_in_prompts": True, "repeat_within_s": 0})
    return demo.model_copy(update={"policy": demo.policy.model_copy(update={"limits": limits})})


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


def paying_user(network: LocalNetwork, label: str, lamports: int = DEPOSIT_LAMPORTS) -> User:
    """Make a user, move HYPE to the platform and claim the deposit."""
    user = log_in(network.url, label)
    network.fund(user.address, 2 * DEPOSIT_LAMPORTS)
    return user.with_deposit(deposited(network, user, lamports))


def deposited(network: LocalNetwork, user: User, lamports: int) -> str:
    """Move a user's HYPE to the platform, claim the deposit and return its hash."""
    tx_hash = transfer_hype(user.account, network.platform_address, lamports, chain_url=network.chain_url)
    body = {"tx_sig": tx_hash, "user_address": user.address}
    credited = user.http.post("/deposit", json=body).raise_for_status().json()
    assert credited["lamports"] == lamports
    return tx_hash


def ledger_redis_url(network: LocalNetwork) -> str:
    """Return the owner's URL of the Redis that holds the ledger."""
    return own_redis_url(network._config.home, BOOKS_STORE)
