from collections.abc import Iterator

import pytest

from tests.chain.running import RunningDevnet, running_devnet


@pytest.fixture
def devnet() -> Iterator[RunningDevnet]:
    with running_devnet() as running:
        yield running
