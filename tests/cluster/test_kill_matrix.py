"""Every piece of a model is killed at every moment of its streams: each goes on, token for token."""

import os
import statistics
from collections.abc import Callable, Iterator

import pytest
import ray

from actors.placement import NAMESPACE
from azu.cli.network.local_network import LocalNetwork
from tests.cluster.actors import pid_of
from tests.cluster.recovering import (
    MODELS,
    Answer,
    Streams,
    four,
    kill_all,
    network_of,
    pieces_of,
    wait_until_prefilling,
    workers,
)
from tests.cluster.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

Spared = tuple[LocalNetwork, User]
NUM_TOKENS = 40
MOMENTS = ("prefill", "first token", "middle", "last token")


@pytest.fixture(scope="module")
def spared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spared]:
    """A network in which any one worker can be done without."""
    with network_of(tmp_path_factory.mktemp("azu"), workers(ada=7, ben=7, cleo=8, dora=8)) as running:
        yield running


def undisturbed(user: User, model: str) -> list[Answer]:
    """Return what the four streams answer when nothing happens."""
    return Streams(user, four(model, NUM_TOKENS)).answers()


def wait_for(moment: str, streams: Streams, model: str) -> None:
    """Wait for a moment of the first stream."""
    if moment == "prefill":
        wait_until_prefilling(model, streams)
        return
    least = {"first token": 1, "middle": NUM_TOKENS // 2, "last token": NUM_TOKENS - 2}[moment]
    streams.wait_until(lambda: streams.each[0].num_tokens >= least)


def disturbed(user: User, model: str, moment: str, disturb: Callable[[], None]) -> tuple[list[Answer], float]:
    """Do something at a moment of four streams; return their answers and the longest stall."""
    streams = Streams(user, four(model, NUM_TOKENS))
    wait_for(moment, streams, model)
    disturb()
    return streams.answers(), streams.longest_stall_s()


def pids(names: list[str]) -> list[int]:
    """Return the process ids of actors."""
    return [pid_of(ray.get_actor(name, namespace=NAMESPACE)) for name in names]


def show(what: str, stalls_s: list[float]) -> None:
    """Print a line of the report."""
    load = os.getloadavg()[0]
    print(
        f"{what}: {len(stalls_s)} times, 4 streams each, identical; longest stall: median "
        f"{statistics.median(stalls_s):.2f} s, worst {max(stalls_s):.2f} s (load {load:.1f})"
    )


@pytest.mark.parametrize("model", MODELS)
def test_each_piece_killed_at_each_moment(spared: Spared, model: str) -> None:
    _, user = spared
    expected = undisturbed(user, model)
    stalls_s: dict[str, list[float]] = {}
    for moment in MOMENTS:
        for index in range(len(pieces_of(model))):
            name = pieces_of(model)[index]
            (pid,) = pids([name])
            answers, stall_s = disturbed(user, model, moment, lambda pid=pid: kill_all([pid]))
            print(f"{name} at {moment}: {stall_s:.2f} s")
            assert answers == expected, (name, moment)
            stalls_s.setdefault(moment, []).append(stall_s)
    for moment, each in stalls_s.items():
        show(f"{model}, a piece killed at {moment}", each)
    # A prompt that has no token yet has no stall between two.
    show(f"{model}, a piece killed", [one for moment in MOMENTS[1:] for one in stalls_s[moment]])


@pytest.mark.parametrize("model", MODELS)
def test_several_pieces_killed_at_once(spared: Spared, model: str) -> None:
    _, user = spared
    expected = undisturbed(user, model)
    choices: tuple[Callable[[list[str]], list[str]], ...] = (
        lambda names: stages_of(names)[:2],
        stages_of,
        lambda names: names,
    )
    stalls_s = []
    for choose in choices:
        doomed = pids(choose(pieces_of(model)))
        answers, stall_s = disturbed(user, model, "middle", lambda doomed=doomed: kill_all(doomed))
        assert answers == expected, doomed
        stalls_s.append(stall_s)
    show(f"{model}, neighbours, all stages and all pieces killed at once", stalls_s)


def stages_of(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("layer:")]
