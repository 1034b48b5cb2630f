"""What one head carries: streams at once over the demo's network, with the head's memory and CPU time.

It prints figures and bounds none: they are the machine's. AZU_TEST_STREAMS names how many streams at once.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from azu.client import Client
from azu.config import load_network
from azu.launch.local_network import DEMO, LocalNetwork, demo_network
from azu.units import LAMPORTS_PER_HYPE, MIB
from tests.network.conftest import paying_user

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

STREAMS = [int(one) for one in os.environ.get("AZU_TEST_STREAMS", "1,16,64").split(",")]
MEASURED_S = 20.0
TOKENS = 32
KINDS = (
    "ServeReplica", "Proxy", "haproxy", "Scheduler", "Pipeline", "valkey", "books", "signer", "treasury",
    "gcs_server", "raylet",
)  # fmt: skip
# Of a node that lends; everything else belongs to the head.
NODES = ("ray::LayerActor", "ray::ExpertActor", "ray::NodeAgent")


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[LocalNetwork]:
    """The demo's network without limits on the number of requests."""
    file = load_network(DEMO)
    limits = file.policy.limits.model_copy(update={"requests_per_minute": 6_000_000, "request_burst": 10**6})
    policy = file.policy.model_copy(update={"limits": limits})
    with demo_network(home, print, file.model_copy(update={"policy": policy})) as network:
        yield network


def head() -> tuple[Counter[str], Counter[str]]:
    """Return resident MiB and CPU seconds of the head's processes by kind."""
    memory, cpu_s = Counter[str](), Counter[str]()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):
            words = " ".join(process.cmdline())
            if words.startswith(NODES):
                continue
            kind = next((one for one in KINDS if one in words), "other")
            times = process.cpu_times()
            memory[kind] += process.memory_info().rss // MIB
            cpu_s[kind] += times.user + times.system
    return memory, cpu_s


class Reader(threading.Thread):
    """Reads one stream after the other until a time."""

    def __init__(self, network: LocalNetwork, api_key: str, until_s: float) -> None:
        super().__init__(daemon=True)
        self._client, self._until_s = Client(network.url, api_key), until_s
        self.answers = 0
        self.first_s: list[float] = []

    def run(self) -> None:
        while (asked_s := time.monotonic()) < self._until_s:
            stream = self._client.stream("Hello", model="azu/tiny-dense", max_tokens=TOKENS, ignore_eos=True)
            for number, _ in enumerate(stream):
                if not number:
                    self.first_s.append(time.monotonic() - asked_s)
            self.answers += 1


def test_streams_at_once(running: LocalNetwork) -> None:
    user = paying_user(running, "load", LAMPORTS_PER_HYPE)
    Client(running.url, user.api_key).generate("Hello", model="azu/tiny-dense", max_tokens=1)
    for count in STREAMS:
        _, before = head()
        began_s = time.monotonic()
        readers = [Reader(running, user.api_key, began_s + MEASURED_S) for _ in range(count)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(MEASURED_S + 300)
        took_s = time.monotonic() - began_s
        memory, after = head()
        answers = sum(reader.answers for reader in readers)
        first_s = sorted(one for reader in readers for one in reader.first_s)
        spent = {kind: after[kind] - before[kind] for kind in after}
        busiest = sorted(spent, key=lambda kind: -spent[kind])[:4]
        shares = ", ".join(f"{kind} {100 * spent[kind] / took_s:.0f}%" for kind in busiest)
        print(
            f"\n{count} streams: {answers / took_s:.1f} answers/s, {TOKENS * answers / took_s:.0f} tokens/s; "
            f"first token after {first_s[len(first_s) // 2]:.2f} s (median), {first_s[-1]:.2f} s at most; "
            f"the head's processes have {sum(memory.values()):,} MiB; of one core: {shares}"
        )
        assert answers >= count
        assert all(reader.answers for reader in readers)
