"""A job whose model fits on no node waits; it goes on when a node joins in time, else it ends."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get

from actors.placement import VRAM
from tests.network.recovering import (
    Running,
    Streams,
    four,
    kill_all,
    network_of,
    node_pids,
    show,
    spared,
    undisturbed,
    wait_until_alive,
)
from tests.network.test_money import settled

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL, NUM_TOKENS = "azu/tiny-dense", 60
NODES = {"ada": 7, "ben": 7}
BUDGET_S = 60.0


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """A network that needs both of its nodes."""
    with network_of(home, spared(budget_s=BUDGET_S, **NODES)) as started:
        yield started


def interrupted(running: Running) -> Streams:
    """Return streams that have lost a node in their middle."""
    streams = Streams(running[1], four(MODEL, NUM_TOKENS))
    doomed = node_pids("ben")
    streams.wait_until(lambda: streams.each[0].num_tokens >= NUM_TOKENS // 3)
    kill_all(doomed)
    return streams


def test_jobs_go_on_when_a_node_joins_in_time(running: Running) -> None:
    network, user = running
    expected = undisturbed(user, MODEL, NUM_TOKENS)

    streams = interrupted(running)
    # With pauses: a key has a rate limit.
    wait_until(lambda: all(job_state(running, one.job_id) == "queued" for one in streams.each))
    wait_until(lambda: len(asked_for()) > 0)
    wanted = asked_for()
    wait_until_alive(network, user, list(NODES))

    assert streams.answers() == expected
    assert wanted[0] == NODES["ada"], "the nodes that are there"
    assert 0 < sum(wanted[1:]) <= NODES["ben"], "and the missing memory"
    wait_until(lambda: not asked_for())
    show(
        f"waited for a node and went on, identical; longest stall {streams.longest_stall_s():.1f} s; "
        f"Ray was asked for nodes of {wanted} MiB meanwhile, and for none after"
    )


def test_jobs_without_a_node_end_with_a_reason_and_release_the_rest(running: Running) -> None:
    network, user = running
    undisturbed(user, MODEL, NUM_TOKENS)
    before, _ = settled(user)

    streams = interrupted(running)
    streams.join()

    after, reserved = settled(user)
    charged = 0
    for stream in streams.each:
        assert "given up after" in stream.fault, stream.fault
        results = user.results(stream.job_id)
        assert results["status"] == "failed"
        assert results["usage"]["completion_tokens"] < NUM_TOKENS
        assert 0 < stream.num_tokens <= results["usage"]["completion_tokens"]
        charged += results["receipt"]["charged_lamports"]
    assert (before - after, reserved) == (charged, 0)
    show(f"ended: {streams.each[0].fault}")
    wait_until_alive(network, user, list(NODES))


def asked_for() -> list[int]:
    """Return the MiB of each bundle that an autoscaler is asked for."""
    return [
        bundle[VRAM] for bundle in json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")
    ]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + BUDGET_S
    while not condition():
        assert time.monotonic() < deadline_s, asked_for()
        time.sleep(0.3)


def job_state(running: Running, job_id: str) -> object:
    return running[1].results(job_id)["status"]
