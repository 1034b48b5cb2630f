from collections.abc import Iterator

import pytest

from tests.money.chain.running import RunningDevnet, running_devnet
from tests.money.treasury.world import World


@pytest.fixture(scope="package")
def devnet_server() -> Iterator[RunningDevnet]:
    with running_devnet() as running:
        yield running


@pytest.fixture
def world(devnet_server: RunningDevnet, redis_url: str) -> Iterator[World]:
    """A platform for this test; its devnet has accounts of other tests, but no faults."""
    yield World(devnet_server, redis_url)
    devnet_server.no_faults()
