"""Tests on several hosts are skipped, with the reason, on a machine that cannot have several."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.namespaces import why_not


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip with the reason on a machine without network namespaces."""
    if (missing := why_not()) is not None:
        pytest.skip(missing)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/tmp", ignore_cleanup_errors=True) as made:
        yield Path(made)
