"""Pieces move to nodes that join or lend more when the gain is worth it, and no stream changes."""

import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from threading import Thread

import pytest

from azu.protocol.node import NodeState
from azu.units import MIB
from tests.network.actors import lend
from tests.network.recovering import (
    TIMEOUT_S,
    Running,
    Streams,
    four,
    kill_all,
    network_of,
    node_names,
    node_pids,
    piece_pids,
    pieces_of,
    show,
    spared,
)
from tests.network.test_nodes import agent, wait_for
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL, NUM_TOKENS = "azu/tiny-dense", 300
# Two stages of 6 MiB, or one stage of the whole model.
HALF_MIB, WHOLE_MIB, MORE_MIB = 7, 12, 24
LOOKS = 4


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """Two nodes with memory for half the model each, and one for the whole model that has not joined yet."""
    file = spared(ada=WHOLE_MIB, ben=HALF_MIB, cleo=MORE_MIB)
    moves = file.policy.moves.model_copy(update={"look_s": 0.5, "rest_s": 2.0})
    policy = file.policy.model_copy(update={"moves": moves})
    with network_of(home, file.model_copy(update={"policy": policy})) as started:
        wait_for(lambda found: found.keys() >= {"ada", "ben", "cleo"}, TIMEOUT_S)
        lend(agent("ada"), HALF_MIB * MIB)
        wait_for(lambda found: found["ada"].vram_total_bytes == HALF_MIB * MIB, TIMEOUT_S)
        lose("cleo")
        yield started


def lose(name: str) -> None:
    kill_all(node_pids(name))
    wait_for(lambda found: name not in found or found[name].state is NodeState.DEAD, TIMEOUT_S)


def stall_of_the_move(running: Running, expected: list[object], where: list[str]) -> float:
    """Keep streams running until the model has moved; return their longest stall."""
    network, user = running
    asked, halves = four(MODEL, NUM_TOKENS), cycle((slice(0, 2), slice(2, 4)))
    deadline_s = time.monotonic() + TIMEOUT_S
    half = next(halves)
    streams, stalls_s = Streams(user, asked[half]), []
    while (is_there := node_names(user, MODEL)) != where or len(stalls_s) < 2:
        assert time.monotonic() < deadline_s, is_there
        if where == ["cleo"]:
            network.revive()
        streams.wait_until(
            lambda streams=streams: min(one.num_tokens for one in streams.each) >= NUM_TOKENS // 2
        )
        half_after = next(halves)
        after = Streams(user, asked[half_after])
        assert streams.answers() == expected[half]
        stalls_s.append(streams.longest_stall_s())
        half, streams = half_after, after
    assert streams.answers() == expected[half]
    return max(*stalls_s[-2:], streams.longest_stall_s())


def kill_the_next_piece(killed: list[int]) -> None:
    before = piece_pids()
    deadline_s = time.monotonic() + TIMEOUT_S
    while not killed and time.monotonic() < deadline_s:
        killed += piece_pids() - before
        time.sleep(0.02)
    kill_all(killed)


def stays(user: User, where: list[str], expected: list[object]) -> None:
    for _ in range(LOOKS):
        assert Streams(user, four(MODEL, NUM_TOKENS)).answers() == expected
        assert node_names(user, MODEL) == where


def test_the_model_moves_to_a_node_that_joins_while_streams_run(running: Running) -> None:
    _, user = running
    expected = Streams(user, four(MODEL, NUM_TOKENS)).answers()
    assert node_names(user, MODEL) == ["ada", "ben"]
    assert len(pieces_of(MODEL)) == 2

    stall_s = stall_of_the_move(running, expected, ["cleo"])

    assert len(pieces_of(MODEL)) == 1, "the moved pieces have ended"
    stays(user, ["cleo"], expected)
    show(
        "a larger node joined under 4 streams: two stages became one there, loaded beside the old ones, all "
        f"identical; longest stall {stall_s:.1f} s"
    )


def test_a_new_piece_that_dies_before_the_switch_changes_nothing_and_the_next_move_works(
    running: Running,
) -> None:
    _, user = running
    lose("cleo")
    expected = Streams(user, four(MODEL, NUM_TOKENS)).answers()
    assert node_names(user, MODEL) == ["ada", "ben"]

    killed: list[int] = []
    killing = Thread(target=kill_the_next_piece, args=(killed,))
    killing.start()
    stall_s = stall_of_the_move(running, expected, ["cleo"])
    killing.join()

    assert killed
    assert len(pieces_of(MODEL)) == 1
    show(f"the new piece killed while it came up, moved later: all identical; longest stall {stall_s:.1f} s")


def test_the_old_piece_ends_first_where_a_node_has_no_room_for_both(running: Running) -> None:
    _, user = running
    lose("cleo")
    expected = Streams(user, four(MODEL, NUM_TOKENS)).answers()
    assert node_names(user, MODEL) == ["ada", "ben"]

    lend(agent("ada"), WHOLE_MIB * MIB)
    stall_s = stall_of_the_move(running, expected, ["ada"])

    assert len(pieces_of(MODEL)) == 1
    stays(user, ["ada"], expected)
    show(
        f"a node lent more under 4 streams: both stages became one on it after its old one had gone, all "
        f"identical; longest stall {stall_s:.1f} s"
    )
