"""The regular canary on a running network: it finds what changes tokens; what changes none is paid."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.network.actors import ask_inside
from tests.network.recovering import Running, pieces_of, show, topology, wait_until
from tests.network.test_canary import MODEL, canaries, canary_network, check_left_out, run, scaled, stage

pytestmark = [pytest.mark.cluster, pytest.mark.prove]


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """A network in which each placement is asked again and again."""
    with canary_network(home, every_s=5.0) as started:
        yield started


def test_a_distortion_that_changes_no_token_is_paid(running: Running) -> None:
    network, user = running
    expected, honest = run(user)
    before = pieces_of(MODEL)
    ask_inside(stage(0), scaled(1 - 1e-6))
    agreed = canaries(network, "agrees")
    # One may have been on its way.
    wait_until(lambda: canaries(network, "agrees") >= agreed + 2, "the canary did not agree")

    assert run(user) == (expected, honest), "docs/trust.md says so"

    assert pieces_of(MODEL) == before
    assert canaries(network, "differs") == 0
    show("a stage that distorts hidden states by a millionth: no token changes, and it is paid")


def test_a_stage_that_changes_tokens_is_left_out_after_the_hourly_canary(running: Running) -> None:
    network, user = running
    expected, _ = run(user)
    liar = topology(user, MODEL)[0]["node"]

    ask_inside(stage(0), scaled(-1.0))

    check_left_out(network, user, liar, expected)
    show(f"a stage that distorts hidden states: {liar} is left out after the next regular canary")
