"""Certificates with a life of two minutes: every node is started again in time while streams go on."""

import threading
import time
from pathlib import Path

import pytest

from azu.client import Client
from tests.hosts.namespaces import lan
from tests.hosts.network import eventually, hosted

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("namespaces")]

MODEL = "azu/tiny-dense"
LIFE_S = 120.0
# Every certificate of the start has ended by then.
WATCHED_S = 200.0
NAMES = ("ada", "ben", "cleo")
PROMPT = "Tell me how azu works."
TOKENS = 60


class Reader(threading.Thread):
    """Reads one answer after the other until it is told to stop, and compares each with the first."""

    def __init__(self, client: Client, expected: str, seed: int) -> None:
        super().__init__()
        self._client, self._expected, self._seed = client, expected, seed
        self.stop = threading.Event()
        self.answers: list[bool] = []
        self.longest_s = 0.0

    def run(self) -> None:
        """Read, until it is told to stop or a stream breaks."""
        while not self.stop.is_set():
            text, last_s = "", time.monotonic()
            for piece in answer(self._client, self._seed):
                text += piece
                self.longest_s = max(self.longest_s, time.monotonic() - last_s)
                last_s = time.monotonic()
            self.answers.append(text == self._expected)


def answer(client: Client, seed: int):
    return client.stream(PROMPT, model=MODEL, max_tokens=TOKENS, temperature=1.0, seed=seed, ignore_eos=True)


def test_streams_go_on_while_every_node_gets_a_new_certificate(folder: Path) -> None:
    with lan(len(NAMES) + 1) as net, hosted(net.hosts[0], folder, node_life_s=LIFE_S) as network:
        client = network.paying_client()
        for name, host in zip(NAMES, net.hosts[1:], strict=True):
            network.join(host, name, network.ticket(host))
        eventually(lambda: network.names() == set(NAMES))
        started_s = time.monotonic()
        first = {node.name: node.node_id for node in client.network().nodes}
        readers = [Reader(client, "".join(answer(client, seed)), seed) for seed in (1, 2)]
        for reader in readers:
            reader.start()
        ids: dict[str, set[str]] = {name: {first[name]} for name in NAMES}
        away_at_once = 0
        while time.monotonic() - started_s < WATCHED_S:
            nodes = client.network().nodes
            there = {node.name for node in nodes if node.state in ("alive", "suspect")}
            away_at_once = max(away_at_once, len(set(NAMES) - there))
            for node in nodes:
                ids[node.name].add(node.node_id)
            time.sleep(0.5)
        for reader in readers:
            reader.stop.set()
        for reader in readers:
            reader.join(120)
        eventually(lambda: network.names() == set(NAMES))
    starts = {name: len(found) for name, found in ids.items()}
    answers = [is_same for reader in readers for is_same in reader.answers]
    longest_s = max(reader.longest_s for reader in readers)
    print(
        f"\nlife {LIFE_S:.0f} s, watched {WATCHED_S:.0f} s: starts of each node {starts}, "
        f"at most {away_at_once} away at once; {len(answers)} answers, "
        f"{answers.count(False)} other than before, longest wait between two tokens {longest_s:.1f} s"
    )
    assert min(starts.values()) >= 2, starts
    assert away_at_once == 1
    assert len(answers) >= 10
    assert all(answers)
