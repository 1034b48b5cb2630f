"""The canary of a new placement on a running network: a stage that changes tokens is left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

from actors.placement import NAMESPACE
from azu.engine.stage_contract import Handoff
from azu.launch.local_network import LocalNetwork
from azu.protocol.frame import Frame
from tests.network.actors import ask_inside
from tests.network.recovering import (
    Answer,
    Running,
    Streams,
    counted,
    end_nodes,
    four,
    network_of,
    node_names,
    pieces_of,
    shares,
    show,
    spared,
    topology,
    wait_until,
    wait_until_alive,
)
from tests.network.test_metrics import scrape
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL, NUM_TOKENS = "azu/tiny-dense", 24
# Each two of them have room for the model.
NODES = {"ada": 8, "ben": 8, "cleo": 8, "dan": 8}


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """A network in which a placement is not asked again during this test."""
    with canary_network(home, every_s=3600.0) as started:
        yield started


@contextmanager
def canary_network(home: Path, every_s: float) -> Iterator[Running]:
    """Run a network that asks the canary so often; two placements without a common node have agreed on it."""
    file = spared(**NODES)
    canary = file.policy.canary.model_copy(update={"every_s": every_s})
    planner = file.policy.planner.model_copy(update={"least_gain": 10.0})  # no piece moves by itself
    policy = file.policy.model_copy(update={"canary": canary, "planner": planner})
    with network_of(home, file.model_copy(update={"policy": policy})) as started:
        network, user = started
        Streams(user, four(MODEL, 1)).answers()
        wait_until(lambda: canaries(network, "provisional") >= 1, "the canary did not answer")
        end_nodes(node_names(user, MODEL))
        wait_until(lambda: canaries(network, "agrees") >= 1, "another placement gave other tokens")
        wait_until_alive(network, user, [*NODES])
        yield started


def canaries(network: LocalNetwork, result: str) -> float:
    labels = frozenset({("model", MODEL), ("result", result)})
    return scrape(network).get(("azu_canaries_total", labels), 0.0)


def stage(index: int) -> ActorHandle:
    """Return the actor of one of the model's stages."""
    return ray.get_actor(pieces_of(MODEL)[index], namespace=NAMESPACE)


def scaled(factor: float) -> Callable[[object], None]:
    """Return what has a LayerActor, from inside, hand on hidden states times a factor."""

    def install(stage: object) -> None:
        runner = stage._runner
        honest = runner.run

        def lying(batch, frame):
            output = honest(batch, frame)
            if not isinstance(output, Handoff) or not output.batch.slices:
                return output
            sent = Frame.decode(output.frame)
            values = np.frombuffer(sent.payload, dtype=np.float32) * np.float32(factor)
            return replace(output, frame=replace(sent, payload=values.tobytes()).encode())

        runner.run = lying

    return install


def run(user: User) -> tuple[list[Answer], dict[str, int]]:
    """Return four streams' answers, and who is paid what for the first."""
    streams = Streams(user, four(MODEL, NUM_TOKENS))
    return streams.answers(), dict(shares(user, streams.each[0].job_id))


def check_left_out(network: LocalNetwork, user: User, liar: str, expected: list[Answer]) -> None:
    """Wait until a node is left out, and no other; the answers are right then."""
    wait_until(lambda: counted(network, "azu_left_out_total", liar) == 1, f"{liar} is not left out")
    assert liar not in node_names(user, MODEL)
    assert all(counted(network, "azu_left_out_total", node) == 0 for node in NODES.keys() - {liar})
    assert run(user)[0] == expected
    states = user.http.get("/v1/network").raise_for_status().json()["nodes"]
    assert {one["name"]: one["state"] for one in states}[liar] == "suspect"


def test_a_stage_that_changes_tokens_is_left_out_after_the_next_placement(running: Running) -> None:
    network, user = running
    expected, honest = run(user)
    liar, asked = topology(user, MODEL)[0]["node"], canaries(network, "agrees")
    ask_inside(stage(0), scaled(-1.0))

    wrong, paid = run(user)

    assert [one.token_ids for one in wrong] != [one.token_ids for one in expected]
    assert paid == honest, "between two canaries wrong tokens are charged and paid: docs/trust.md says so"
    assert (canaries(network, "agrees"), canaries(network, "differs")) == (asked, 0), "it is not due"
    ray.kill(stage(-1))  # its successor makes this another placement
    check_left_out(network, user, liar, expected)
    show(f"a stage that distorts hidden states: {liar} is left out after the placement's canary")
