"""Workers that lie on a running network: what they say is not delivered or charged, and they are named."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.actor import ActorHandle

from actors.placement import NAMESPACE
from azu.launch.local_network import LocalNetwork
from tests.network.actors import actors_named, ask_inside
from tests.network.recovering import (
    Answer,
    Running,
    Streams,
    four,
    network_of,
    pieces_of,
    show,
    spared,
    undisturbed,
)
from tests.network.test_metrics import scrape
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL = "azu/tiny-dense"
NUM_TOKENS = 24
TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """A network with room for the model on each of two pairs of nodes."""
    file = spared(ada=8, ben=8, cleo=8, dan=8)
    with network_of(home, file) as started:
        yield started


@pytest.fixture(scope="module")
def expected(running: Running) -> list[Answer]:
    return undisturbed(running[1], MODEL, NUM_TOKENS)


def nodes_by_stage(user: User) -> list[str]:
    """Return the names of the nodes of the model's stages, in order."""
    deployments = user.http.get("/v1/network").raise_for_status().json()["deployments"]
    (topology,) = [one["topology"] for one in deployments if one["model_id"] == MODEL]
    return [piece["node"] for piece in topology]


def stage(index: int) -> ActorHandle:
    """Return the actor of one of the model's stages."""
    return ray.get_actor(pieces_of(MODEL)[index], namespace=NAMESPACE)


def counted(network: LocalNetwork, metric: str, node: str) -> float:
    return scrape(network).get((metric, frozenset({("node", node)})), 0.0)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.2)


def lie_once(stage: object) -> None:
    """Have a LayerActor, from inside, answer one step with a token more and work that no one did."""
    from dataclasses import replace

    from azu.protocol.step import ExpertWork, StepResult

    runner = stage._runner
    honest, steps = runner.run, iter(range(10**9))

    def lying(batch, frame):
        output = honest(batch, frame)
        if not isinstance(output, StepResult) or not output.tokens or next(steps) != 5:
            return output
        work = (ExpertWork(0, 3, {one.sequence_id: 10**9 for one in output.tokens}),)
        return replace(output, tokens=(*output.tokens, output.tokens[0]), expert_work=work)

    runner.run = lying


def test_a_last_stage_that_lies_is_named_and_changes_neither_answer_nor_charge(
    running: Running, expected: list[Answer]
) -> None:
    network, user = running
    liar = nodes_by_stage(user)[-1]
    before, pieces = counted(network, "azu_bad_frames_total", liar), pieces_of(MODEL)
    ask_inside(stage(-1), lie_once)

    answers = Streams(user, four(MODEL, NUM_TOKENS)).answers()

    assert answers == expected, "the same text, tokens and charge"
    assert pieces_of(MODEL)[0] == pieces[0], "the other stage stayed"
    assert pieces_of(MODEL)[-1] != pieces[-1], "the liar was replaced"
    wait_until(lambda: counted(network, "azu_bad_frames_total", liar) == before + 1, f"{liar} is not named")
    show(f"a last stage that lies: {liar} is named, 4 streams are identical")


def distort(stage: object) -> None:
    """Have a LayerActor, from inside, hand on hidden states that are finite and wrong."""
    from dataclasses import replace

    import numpy as np

    from azu.engine.stage_contract import Handoff
    from azu.protocol.frame import Frame

    runner = stage._runner
    honest = runner.run

    def lying(batch, frame):
        output = honest(batch, frame)
        if not isinstance(output, Handoff) or not output.batch.slices:
            return output
        sent = Frame.decode(output.frame)
        values = np.frombuffer(sent.payload, dtype=np.float32)
        return replace(output, frame=replace(sent, payload=(-values).tobytes()).encode())

    runner.run = lying


def know_tokens(scheduler: object) -> bool:
    """Return, inside the scheduler, whether the canary's tokens are known for a model."""
    return any(one.known is not None for one in scheduler._canary._known.values())


def take_answer_as_known(scheduler: object) -> bool:
    """Have the scheduler take the first answer for known, as a second placement elsewhere would."""
    for known in scheduler._canary._known.values():
        if known.known is None and known.seen:
            known.take(known.seen[0][0], frozenset({"elsewhere"}))
    return know_tokens(scheduler)


def ask_canary_now(scheduler: object) -> None:
    for one in scheduler._canary._watched.values():
        one.due_s = 0.0


def inside_scheduler(question: Callable[[object], object]) -> object:
    (scheduler,) = actors_named("scheduler")
    return ask_inside(scheduler, question)


def test_a_stage_that_changes_the_canarys_tokens_is_found_and_left_out(
    running: Running, expected: list[Answer]
) -> None:
    network, user = running
    wait_until(lambda: bool(inside_scheduler(take_answer_as_known)), "the canary did not answer")
    time.sleep(15.0)  # a node that was blamed before takes pieces again
    liar = nodes_by_stage(user)[0]
    ask_inside(stage(0), distort)

    inside_scheduler(ask_canary_now)

    wait_until(lambda: counted(network, "azu_left_out_total", liar) == 1, f"{liar} is not left out")
    assert liar not in nodes_by_stage(user)
    others = {node for node in ("ada", "ben", "cleo", "dan") if node != liar}
    assert all(counted(network, "azu_left_out_total", node) == 0 for node in others)
    assert Streams(user, four(MODEL, NUM_TOKENS)).answers() == expected
    states = user.http.get("/v1/network").raise_for_status().json()["nodes"]
    assert {one["name"]: one["state"] for one in states}[liar] == "suspect"
    show(f"a stage that distorts hidden states: {liar} is left out, 4 streams are identical")


def shrink(stage: object) -> None:
    """Have a LayerActor, from inside, hand on hidden states that are wrong by a millionth."""
    from dataclasses import replace

    import numpy as np

    from azu.engine.stage_contract import Handoff
    from azu.protocol.frame import Frame

    runner = stage._runner
    honest = runner.run

    def lying(batch, frame):
        output = honest(batch, frame)
        if not isinstance(output, Handoff) or not output.batch.slices:
            return output
        sent = Frame.decode(output.frame)
        values = np.frombuffer(sent.payload, dtype=np.float32) * np.float32(1 - 1e-6)
        return replace(output, frame=replace(sent, payload=values.tobytes()).encode())

    runner.run = lying


def canaries(network: LocalNetwork, result: str) -> float:
    labels = frozenset({("model", MODEL), ("result", result)})
    return scrape(network).get(("azu_canaries_total", labels), 0.0)


def test_a_distortion_that_changes_no_token_of_the_canary_is_paid(
    running: Running, expected: list[Answer]
) -> None:
    network, user = running
    before = pieces_of(MODEL)
    ask_inside(stage(0), shrink)
    agreed = canaries(network, "agrees")
    inside_scheduler(ask_canary_now)
    wait_until(lambda: canaries(network, "agrees") > agreed, "the canary did not agree")

    streams = Streams(user, four(MODEL, NUM_TOKENS))
    streams.join()

    assert pieces_of(MODEL) == before, "the canary does not find it: docs/trust.md says so"
    receipt = user.results(streams.each[0].job_id)["receipt"]
    assert isinstance(receipt, dict)
    assert sum(receipt["worker_lamports"].values()) + receipt["held_lamports"] > 0
