"""Workers and nodes are killed for a quarter of an hour under eight clients, and no answer changes.

AZU_TEST_KILLS and AZU_TEST_KILL_SECONDS make it shorter.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.network.recovering import (
    MODELS,
    Answer,
    Asked,
    Running,
    Stream,
    Streams,
    four,
    kill_all,
    network_of,
    node_pids,
    pids,
    pieces_of,
    show,
    spared,
    wait_until_alive,
)
from tests.network.test_money import settled

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

NUM_KILLS = int(os.environ.get("AZU_TEST_KILLS", "60"))
SECONDS = float(os.environ.get("AZU_TEST_KILL_SECONDS", "900"))
SEED = int(os.environ.get("AZU_TEST_SEED", "1"))
NUM_CLIENTS = 8
NODES = {"ada": 7, "ben": 7, "cleo": 8, "dora": 8}
# One kill in this many ends a whole node.
ONE_NODE_IN = 4


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """A network that can lose any one node."""
    with network_of(home, spared(**NODES)) as started:
        yield started


@dataclass(slots=True)
class Seen:
    """What the clients received."""

    tokens: int = 0
    faults: list[str] = field(default_factory=list)
    stalls_s: list[float] = field(default_factory=list)


def prompts() -> tuple[Asked, ...]:
    """Return requests of both models, of different lengths."""
    return tuple(
        replace(one, max_tokens=20 + 10 * index)
        for model in MODELS
        for index, one in enumerate(four(model, 0, words=40))
    )


def keep_asking(running: Running, expected: dict[Asked, Answer], seen: Seen, stop: Event, seed: int) -> None:
    """Send one prompt after another until the run is over."""
    chance = random.Random(seed)
    user = running[1]
    while not stop.is_set():
        stream = Stream(chance.choice(list(expected)))
        stream.read(user)
        try:
            answer = stream.answer(user)
        except Exception as error:
            seen.faults.append(f"{stream.job_id}: {error}")
            continue
        if answer != expected[stream.asked]:
            seen.faults.append(f"{stream.job_id}: {answer} is not {expected[stream.asked]}")
        seen.tokens += len(answer.token_ids)
        seen.stalls_s.append(stream.longest_stall_s())


def kill_something(chance: random.Random) -> str:
    """Kill a piece of a model or a whole node; return which kind it was."""
    found = [name for model in MODELS for name in pieces_of(model)]
    if not found or chance.randrange(ONE_NODE_IN) == 0:
        kill_all(node_pids(chance.choice(sorted(NODES))))
        return "node"
    name = chance.choice(found)
    try:
        doomed = pids([name])
    except Exception:
        return "gone"  # it was given up between two looks
    kill_all(doomed)
    return name.partition(":")[0]


def test_random_kills_change_no_answer(running: Running, home: Path) -> None:
    network, user = running
    asked = prompts()
    expected: dict[Asked, Answer] = {}
    for half in (asked[:4], asked[4:]):
        expected |= dict(zip(half, Streams(user, half).answers(), strict=True))
    seen, stop, chance = [Seen() for _ in range(NUM_CLIENTS)], Event(), random.Random(SEED)
    clients = [
        Thread(target=keep_asking, args=(running, expected, one, stop, SEED * 1000 + index), daemon=True)
        for index, one in enumerate(seen)
    ]
    started_s = time.monotonic()
    for client in clients:
        client.start()

    kills: Counter[str] = Counter()
    while (number := kills.total() - kills["gone"]) < NUM_KILLS:
        due_s = started_s + (number + 1) * SECONDS / (NUM_KILLS + 1)
        while time.monotonic() < due_s:
            network.revive()
            time.sleep(0.2)
        wait_until_alive(network, user, list(NODES))
        kills[kill_something(chance)] += 1
    while time.monotonic() < started_s + SECONDS:
        network.revive()
        time.sleep(0.2)
    stop.set()
    wait_until_alive(network, user, list(NODES))
    for client in clients:
        client.join(timeout=180)
    took_s = time.monotonic() - started_s

    faults = [fault for one in seen for fault in one.faults]
    stalls_s = sorted(stall for one in seen for stall in one.stalls_s)
    num_kills, num_tokens = kills.total() - kills["gone"], sum(one.tokens for one in seen)
    show(f"{num_kills} kills in {took_s:.0f} s with {NUM_CLIENTS} clients: {dict(kills)}")
    show(f"{len(stalls_s)} jobs, {num_tokens} tokens, {len(faults)} faults: {faults[:3]}")
    usual_s = stalls_s[len(stalls_s) * 95 // 100]
    show(f"longest stall of a job: 95% under {usual_s:.1f} s, worst {stalls_s[-1]:.1f} s")
    assert not any(client.is_alive() for client in clients)
    assert faults == []
    assert settled(user)[1] == 0
    audited = subprocess.run(
        [str(Path(sys.executable).with_name("azu")), "ledger", "audit", "--json"],
        env=os.environ | {"AZU_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert audited.returncode == 0, audited.stdout + audited.stderr
    show(f"ledger audit: {json.dumps(json.loads(audited.stdout))[:200]}")
