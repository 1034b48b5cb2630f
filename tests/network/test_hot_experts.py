"""Hot experts get replicas while nodes have spare memory, and a replica serves when a set dies."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.network.recovering import (
    TIMEOUT_S,
    Running,
    Streams,
    end_nodes,
    four,
    kill_all,
    network_of,
    pids,
    pieces_of,
    show,
    spared,
    wait_until_alive,
)
from tests.network.test_nodes import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL, NUM_TOKENS = "azu/tiny-moe", 200
# Two stages, and two sets that together hold all experts of two layers.
FIRST = {"ada": 5, "ben": 3, "cleo": 1, "dora": 1}
LATER = {"eve": 6, "finn": 6}


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """Nodes without spare memory, and some that join after the model has started."""
    file = spared(**FIRST, **LATER)
    moves = file.policy.moves.model_copy(update={"look_s": 0.5, "rest_s": 1.0})
    # Here, slightly more requests make an expert hot, and no gain makes a piece move.
    planner = file.policy.planner.model_copy(update={"hot_expert": 1.1, "least_gain": 10.0})
    policy = file.policy.model_copy(update={"moves": moves, "planner": planner})
    with network_of(home, file.model_copy(update={"policy": policy})) as started:
        wait_for(lambda found: found.keys() >= {*FIRST, *LATER}, TIMEOUT_S)
        end_nodes(LATER)
        yield started


def expert_sets() -> list[str]:
    return [name for name in pieces_of(MODEL) if name.startswith("expert:")]


def test_hot_experts_get_replicas_under_streams_and_a_replica_serves_when_its_set_dies(
    running: Running,
) -> None:
    network, user = running
    asked = four(MODEL, NUM_TOKENS)
    expected = Streams(user, asked).answers()
    originals = expert_sets()
    assert originals
    for _ in range(4):
        assert Streams(user, asked).answers() == expected
    assert expert_sets() == originals, "no node has spare memory"

    wait_until_alive(network, user, [*FIRST, *LATER])
    deadline_s, stalls_s = time.monotonic() + TIMEOUT_S, []
    while not set(expert_sets()) > set(originals):
        assert time.monotonic() < deadline_s, pieces_of(MODEL)
        streams = Streams(user, asked)
        assert streams.answers() == expected
        stalls_s.append(streams.longest_stall_s())
    replicas = set(expert_sets()) - set(originals)

    killed_stalls_s = []
    for name in (*originals, *sorted(replicas)):
        streams = Streams(user, asked)
        streams.wait_until(lambda streams=streams: min(one.num_tokens for one in streams.each) > 20)
        if name in expert_sets():
            kill_all(pids([name]))
        assert streams.answers() == expected, name
        killed_stalls_s.append(streams.longest_stall_s())
    assert set(expert_sets()).isdisjoint({*originals, *replicas})
    worst_s = max(killed_stalls_s)
    show(
        f"{len(originals)} sets of experts, {len(replicas)} more for hot ones under 4 streams, longest stall "
        f"{max(stalls_s):.1f} s; each set killed in turn: all identical, longest stall {worst_s:.1f} s"
    )
