"""Every piece of a model is killed at every moment of its streams: each stream goes on, token for token."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.network.recovering import (
    Running,
    disturbed,
    kill_all,
    kill_and_kill_again,
    network_of,
    pids,
    pieces_of,
    show_stalls,
    spared,
    undisturbed,
    wait_for_pieces,
    wait_for_waiting,
)

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

NUM_TOKENS = 40
# In this order, because the second uses the memory that the first leaves.
MODELS = ("azu/tiny-dense", "azu/tiny-moe")
MOMENTS = ("prefill", "first token", "middle", "last token")


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """A network so small that experts are spread; a new piece fits where the old one was."""
    with network_of(home, spared(ada=7, ben=7, cleo=8)) as started:
        yield started


@pytest.mark.parametrize("model", MODELS)
def test_each_piece_killed_at_each_moment(running: Running, model: str) -> None:
    _, user = running
    expected = undisturbed(user, model, NUM_TOKENS)
    count = len(pieces_of(model))
    stalls_s: dict[str, list[float]] = {}
    for moment in MOMENTS:
        for index in range(count):
            name = wait_for_pieces(model, count)[index]
            doomed = pids([name])
            wait_for_waiting()
            answers, stall_s = disturbed(
                user, model, NUM_TOKENS, moment, lambda doomed=doomed: kill_all(doomed)
            )
            print(f"{name} at {moment}: {stall_s:.2f} s")
            assert answers == expected, (name, moment)
            stalls_s.setdefault(moment, []).append(stall_s)
    for moment, each in stalls_s.items():
        show_stalls(f"{model}, a piece killed at {moment}", each)
    # A prompt without tokens has no stall between two.
    show_stalls(f"{model}, a piece killed", [one for moment in MOMENTS[1:] for one in stalls_s[moment]])


@pytest.mark.parametrize("model", MODELS)
def test_several_pieces_killed_at_once(running: Running, model: str) -> None:
    _, user = running
    expected = undisturbed(user, model, NUM_TOKENS)
    count = len(pieces_of(model))
    choices: tuple[Callable[[list[str]], list[str]], ...] = (
        lambda names: stages_of(names)[:2],
        stages_of,
        lambda names: names,
    )
    stalls_s = []
    for choose in choices:
        doomed = pids(choose(wait_for_pieces(model, count)))
        answers, stall_s = disturbed(
            user, model, NUM_TOKENS, "middle", lambda doomed=doomed: kill_all(doomed)
        )
        assert answers == expected, doomed
        stalls_s.append(stall_s)
    show_stalls(f"{model}, neighbours, all stages and all pieces killed at once", stalls_s)


@pytest.mark.parametrize("model", MODELS)
def test_a_replacement_or_another_piece_killed_while_the_replacement_loads(
    running: Running, model: str
) -> None:
    _, user = running
    expected = undisturbed(user, model, NUM_TOKENS)
    count = len(pieces_of(model))
    stalls_s = []
    for index in range(count):
        first, other = pids([wait_for_pieces(model, count)[each] for each in (index, index - 1)])
        choices: tuple[Callable[[set[int]], int], ...] = (max, lambda fresh, other=other: other)
        answers, stall_s = disturbed(
            user,
            model,
            NUM_TOKENS,
            "middle",
            lambda first=first, choose=choices[index % 2]: kill_and_kill_again(first, choose),
        )
        assert answers == expected, index
        stalls_s.append(stall_s)
    show_stalls(f"{model}, its replacement or another piece killed while it loads", stalls_s)


def stages_of(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("layer:")]
