"""Fixtures that all tests share."""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
import redis
from hypothesis import settings

from tests.redis_server import RunningRedis, start_redis

# A shell starts background commands with Ctrl-C ignored; all processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Ray reads its mode once, when the first test imports it.
os.environ["RAY_AUTH_MODE"] = "token"
# torch reads this once. Beside the cluster's tests a second thread waits longer for a core than it computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# hypothesis fails an example that takes 200 ms, which on a busy machine says nothing about the code.
settings.register_profile("azu", deadline=None)
settings.load_profile("azu")

_FIGURES = pytest.StashKey[Counter[str]]()


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Counter[str]:
    """Description -> number that tests measured or counted; printed when all tests have run."""
    return pytestconfig.stash.setdefault(_FIGURES, Counter())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    for what, figure in config.stash.get(_FIGURES, Counter()).items():
        terminalreporter.write_line(f"{figure:,} {what}")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRedis]:
    """One Redis for the session; it stores nothing on disk."""
    running = start_redis(tmp_path_factory.mktemp("redis"))
    yield running
    running.stop()


@pytest.fixture
def redis_url(redis_server: RunningRedis) -> str:
    """The URL of a Redis that is empty when the test starts."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url
