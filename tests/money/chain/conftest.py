from collections.abc import Iterator

import pytest

from tests.money.chain.running import RunningDevnet, fresh_address, running_devnet


@pytest.fixture(scope="package")
def devnet_server() -> Iterator[RunningDevnet]:
    with running_devnet() as running:
        yield running


@pytest.fixture
def devnet(devnet_server: RunningDevnet) -> Iterator[RunningDevnet]:
    """A devnet without faults; other tests' accounts are on it."""
    yield devnet_server
    devnet_server.no_faults()


@pytest.fixture
def bob() -> str:
    """An address that never received anything."""
    return fresh_address()
