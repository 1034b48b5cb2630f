"""Whole nodes are killed or frozen while streams run: each stream goes on, token for token."""

import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest

from azu.cluster.liveness import STILL_S
from tests.network.recovering import (
    MODELS,
    Running,
    Streams,
    disturbed,
    four,
    kill_all,
    network_of,
    node_names,
    node_pids,
    pids,
    pieces_of,
    show_stalls,
    signal_all,
    spared,
    undisturbed,
    wait_for_pieces,
    wait_for_waiting,
    wait_until_alive,
)

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

NUM_TOKENS = 60
NODES = {"ada": 7, "ben": 7, "cleo": 8, "dora": 8}


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """A network that can lose any one node."""
    with network_of(home, spared(**NODES)) as started:
        yield started


@pytest.mark.parametrize("model", MODELS)
def test_each_node_of_a_model_killed(running: Running, model: str) -> None:
    network, user = running
    expected = undisturbed(user, model, NUM_TOKENS)
    stalls_s = []
    for moment in ("first token", "middle"):
        for index in range(len(node_names(user, model))):
            name = node_names(user, model)[index]
            doomed = node_pids(name)
            wait_for_waiting()
            answers, stall_s = disturbed(
                user, model, NUM_TOKENS, moment, lambda doomed=doomed: kill_all(doomed)
            )
            print(f"{model}: node {name} killed at {moment}: {stall_s:.2f} s")
            assert answers == expected, (name, moment)
            stalls_s.append(stall_s)
            wait_until_alive(network, user, list(NODES))
    show_stalls(f"{model}, a whole node killed", stalls_s)


@pytest.mark.parametrize("model", MODELS)
def test_a_piece_that_is_frozen_and_wakes_changes_no_stream(running: Running, model: str) -> None:
    _, user = running
    expected = undisturbed(user, model, NUM_TOKENS)
    count = len(pieces_of(model))
    stalls_s = []
    # Below a minute no piece is replaced; above it, the piece wakes after its replacement started.
    for frozen_s, indices in ((8.0, range(count)), (75.0, (0, count - 1))):
        for index in indices:
            frozen = pids([wait_for_pieces(model, count)[index]])
            waking = Timer(frozen_s, signal_all, (frozen, signal.SIGCONT))

            def freeze(frozen: list[int] = frozen, waking: Timer = waking) -> None:
                signal_all(frozen, signal.SIGSTOP)
                waking.start()

            answers, stall_s = disturbed(user, model, NUM_TOKENS, "middle", freeze)
            waking.join()
            assert answers == expected, (index, frozen_s)
            stalls_s.append(stall_s)
            if frozen_s < STILL_S:
                assert stall_s < frozen_s + 5.0, "it was waited for"
    show_stalls(f"{model}, a piece frozen for 8 and 75 s", stalls_s)


@pytest.mark.parametrize("model", MODELS)
def test_a_node_that_is_frozen_and_wakes_changes_no_stream(running: Running, model: str) -> None:
    network, user = running
    expected = undisturbed(user, model, NUM_TOKENS)
    stalls_s = []
    for index in range(len(node_names(user, model))):
        # Its raylet is frozen too, so its pieces cannot be ended before they wake.
        frozen = node_pids(node_names(user, model)[index])
        waking = Timer(20.0, signal_all, (frozen, signal.SIGCONT))

        def freeze(frozen: list[int] = frozen, waking: Timer = waking) -> None:
            signal_all(frozen, signal.SIGSTOP)
            waking.start()

        answers, stall_s = disturbed(user, model, NUM_TOKENS, "middle", freeze)
        again = Streams(user, four(model, NUM_TOKENS))
        waking.join()
        assert answers == expected, index
        assert again.answers() == expected, "the woken piece changed an answer"
        stalls_s.append(stall_s)
        wait_until_alive(network, user, list(NODES))
    show_stalls(f"{model}, a whole node frozen for 20 s", stalls_s)
