from collections.abc import Iterator

import pytest

from tests.chain.running import RunningDevnet, running_devnet
from tests.treasury.world import World


@pytest.fixture
def devnet() -> Iterator[RunningDevnet]:
    with running_devnet() as running:
        yield running


@pytest.fixture
def world(devnet: RunningDevnet, redis_url: str) -> World:
    return World(devnet, redis_url)
