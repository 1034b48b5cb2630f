"""Routers, expert sets and last stages that lie on a running network whose experts are spread.

The liar is named and counted, the step is run again on another node, the tokens are right, and no one is
paid more than for what was computed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.placement import NAMESPACE
from azu.engine.stage_contract import Handoff
from azu.launch.local_network import LocalNetwork
from azu.protocol.step import ExpertWork, SequenceFault, StepBatch, StepResult
from tests.network.actors import ask_inside
from tests.network.recovering import (
    TIMEOUT_S,
    Answer,
    Running,
    Streams,
    counted,
    end_nodes,
    four,
    network_of,
    pieces_of,
    shares,
    show,
    spared,
    topology,
    wait_for_pieces,
    wait_until,
    wait_until_alive,
)
from tests.network.test_metrics import scrape
from tests.network.test_nodes import wait_for
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL, NUM_TOKENS = "azu/tiny-moe", 24
# Two stages, and two sets that together hold all experts of some layers.
FIRST = {"ada": 5, "ben": 3, "cleo": 1, "dora": 1}
# Each has room for any piece of a liar.
LATER = {"eve": 6, "finn": 6}
NODES = (*FIRST, *LATER)
HONEST_STEPS = 5
# A job's pot is divided by largest remainder: where a part goes to the platform, the last lamport of each of
# the four jobs may go to another worker.
ROUNDING = 4

Line = Mapping[str, Any]
Lie = Callable[[Any], Any]


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """A network whose model is up on the first nodes, with room for its pieces on others."""
    file = spared(**FIRST, **LATER)
    # No piece moves, and no expert gets a copy, but for a lie.
    planner = file.policy.planner.model_copy(update={"hot_expert": 1e9, "least_gain": 10.0})
    policy = file.policy.model_copy(update={"planner": planner})
    with network_of(home, file.model_copy(update={"policy": policy})) as started:
        network, user = started
        wait_for(lambda found: found.keys() >= {*NODES}, TIMEOUT_S)
        end_nodes(LATER)
        Streams(user, four(MODEL, 1)).answers()
        wait_until_alive(network, user, NODES)
        print(*topology(user, MODEL), sep="\n")
        yield started


def sets(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["actor"].startswith("expert:")]


def router(lines: list[Line]) -> Line:
    """Return the first stage that has experts elsewhere."""
    layers = {int(layer) for line in sets(lines) for layer in line["experts"]}
    return next(line for line in lines if layers & set(range(*line["layers"])))


def sharing_set(lines: list[Line]) -> Line:
    """Return a set that holds some of the experts of a layer, and another piece the others."""
    return next(line for line in sets(lines) if any(len(held) < 8 for held in line["experts"].values()))


def last_stage(lines: list[Line]) -> Line:
    return [line for line in lines if line["actor"].startswith("layer:")][-1]


def run(user: User, lie: Callable[[], None] = lambda: None) -> tuple[list[Answer], Counter[str]]:
    """Return four streams' answers and who has which part of what they cost."""
    streams = Streams(user, four(MODEL, NUM_TOKENS))
    streams.wait_until(lambda: streams.each[0].num_tokens >= 1)
    lie()
    answers, paid = streams.answers(), Counter[str]()
    for one in streams.each:
        paid += shares(user, one.job_id)
    return answers, paid


def payout(node: str) -> str:
    return f"0x{NODES.index(node) + 1:040x}"


def disputed(network: LocalNetwork) -> float:
    return scrape(network).get(("azu_disputed_choices_total", frozenset({("model", MODEL)})), 0.0)


def told(change: Lie) -> Callable[[object], None]:
    """Return what has a LayerActor, from inside, tell one lie after some honest steps with expert work."""

    def install(stage: object) -> None:
        runner = stage._runner
        honest, steps = runner.run, iter(range(10**9))

        def lying(batch, frame):
            output = honest(batch, frame)
            said = output.batch if isinstance(output, Handoff) else output
            if not said.expert_work or not isinstance(output, Handoff | StepResult):
                return output
            if isinstance(said, StepResult) and not said.tokens:
                return output
            if next(steps) != HONEST_STEPS:
                return output
            return replace(output, batch=change(said)) if isinstance(output, Handoff) else change(said)

        runner.run = lying

    return install


def first_sequence(said: StepBatch | StepResult) -> int:
    return next(iter(said.expert_work[0].choices))


ROUTERS: dict[str, Lie] = {
    "more work than it sent": lambda said: replace(
        said,
        expert_work=(*said.expert_work, replace(said.expert_work[-1], choices={first_sequence(said): 1})),
    ),
    "a count that is huge": lambda said: replace(
        said,
        expert_work=(
            *said.expert_work,
            replace(said.expert_work[-1], choices={first_sequence(said): 10**40}),
        ),
    ),
    "experts that no set holds": lambda said: replace(
        said, expert_work=tuple(replace(one, expert_set=7) for one in said.expert_work)
    ),
    "experts of a layer that its sets do not hold": lambda said: replace(
        said, expert_work=(*said.expert_work, ExpertWork(0, 0, {first_sequence(said): 1}))
    ),
    "an unknown node": lambda said: replace(
        said, faults=(SequenceFault(first_sequence(said), "internal_error", "no", "mallory"),)
    ),
}
LAST_STAGES: dict[str, Lie] = {
    "a sequence that the step did not sample": lambda said: replace(
        said, tokens=(*said.tokens, replace(said.tokens[0], sequence_id=10**6))
    ),
    "two tokens of one sequence": lambda said: replace(said, tokens=(*said.tokens, said.tokens[0])),
    "no work at all": lambda said: replace(said, expert_work=()),
    "no answer": lambda _: "no answer",
}
STAGES = [(router, name, lie) for name, lie in ROUTERS.items()] + [
    (last_stage, name, lie) for name, lie in LAST_STAGES.items()
]


def check_replaced(
    running: Running, find: Callable[[list[Line]], Line], lie: Callable[[object], None]
) -> str:
    """Have one piece lie so that it is refused; check who is named, what moved, and who is paid."""
    network, user = running
    wait_until_alive(network, user, NODES)  # a node that was blamed before takes pieces again
    expected, honest = run(user)
    before, named = (
        topology(user, MODEL),
        {node: counted(network, "azu_bad_frames_total", node) for node in NODES},
    )
    liar = find(before)
    piece = ray.get_actor(liar["actor"], namespace=NAMESPACE)

    answers, paid = run(user, lambda: ask_inside(piece, lie))

    assert answers == expected, "the same text, tokens and charge"
    assert paid.total() == honest.total()
    assert paid[payout(liar["node"])] <= honest[payout(liar["node"])], "who lies gains nothing"
    assert paid["held"] == honest["held"] == 0
    assert paid["platform"] == honest["platform"], "the step that was refused is not paid at all"
    wait_for_pieces(MODEL, len(before))
    for was, now in zip(before, topology(user, MODEL), strict=True):
        if was == liar:
            assert now["node"] != liar["node"], "the step is run again elsewhere"
            assert (now["layers"], now["experts"]) == (was["layers"], was["experts"])
        else:
            assert now == was, "an honest piece stays"
    named[liar["node"]] += 1
    wait_until(
        lambda: {node: counted(network, "azu_bad_frames_total", node) for node in NODES} == named,
        f"{liar['node']} is not named, or another is",
    )
    return str(liar["node"])


@pytest.mark.parametrize(
    ("find", "lie"), [(find, lie) for find, _, lie in STAGES], ids=[n for _, n, _ in STAGES]
)
def test_a_stage_that_lies_about_a_step_is_named_and_gains_nothing(
    running: Running, find: Callable[[list[Line]], Line], lie: Lie, request: pytest.FixtureRequest
) -> None:
    liar = check_replaced(running, find, told(lie))
    show(f"{request.node.callspec.id}: {liar} is named, 4 streams are identical")


def claims(change: Lie) -> Callable[[object], None]:
    """Return what has an ExpertActor, from inside, answer otherwise when it is asked what it got."""

    def install(expert: object) -> None:
        received = expert._runner.received
        honest = received.of

        def lying(epoch, steps):
            got = honest(epoch, steps)
            return got and change(got)

        received.of = lying

    return install


def times(factor: int) -> Lie:
    return lambda got: {step: {layer: factor * n for layer, n in of.items()} for step, of in got.items()}


@pytest.mark.parametrize(
    "lie", [times(-1), lambda got: {10**9: {0: 1}}], ids=["less than nothing", "no step"]
)
def test_an_expert_set_that_claims_what_cannot_be_is_named_and_gains_nothing(
    running: Running, lie: Lie, request: pytest.FixtureRequest
) -> None:
    liar = check_replaced(running, lambda lines: sets(lines)[0], claims(lie))
    show(f"a set that claims {request.node.callspec.id}: {liar} is named, 4 streams are identical")


def check_disputed(
    running: Running, find: Callable[[list[Line]], Line], lie: Callable[[object], None]
) -> tuple[Line, Counter[str], Counter[str]]:
    """Have one piece count otherwise than its other end; return it and who is paid, honestly and so."""
    network, user = running
    wait_until_alive(network, user, NODES)
    expected, honest = run(user)
    before, differed = topology(user, MODEL), disputed(network)
    liar = find(before)
    ask_inside(ray.get_actor(liar["actor"], namespace=NAMESPACE), lie)

    answers, paid = run(user)

    assert answers == expected, "the same text, tokens and charge"
    assert topology(user, MODEL) == before, "nothing shows who is wrong: no piece is replaced"
    for node in NODES:
        most = honest[payout(node)] + ROUNDING
        assert paid[payout(node)] <= most, f"{node} is paid for what was not computed"
    assert paid["platform"] > honest["platform"] + ROUNDING, (
        "what the two do not agree about is the platform's"
    )
    assert paid.total() == honest.total()
    wait_until(lambda: disputed(network) > differed, "the difference is not counted")
    return liar, honest, paid


def replaced_by_an_honest_one(running: Running, liar: Line) -> None:
    """Kill a piece that lies, and wait for its successor."""
    ray.kill(ray.get_actor(liar["actor"], namespace=NAMESPACE))
    wait_until(
        lambda: liar["actor"] not in (names := pieces_of(MODEL)) and len(names) == 4, "it was not replaced"
    )
    run(running[1])


@pytest.mark.parametrize("factor", [3, 10**12, 0])
def test_an_expert_set_that_claims_more_or_less_than_it_got_is_paid_the_smaller_count(
    running: Running, factor: int
) -> None:
    liar, honest, paid = check_disputed(running, sharing_set, claims(times(factor)))

    own = payout(liar["node"])
    # The node may hold another piece too, which is paid.
    if factor:
        assert abs(paid[own] - honest[own]) <= ROUNDING, "the smaller count is paid"
    else:
        assert paid[own] < honest[own] - ROUNDING, "the smaller count is paid"
    replaced_by_an_honest_one(running, liar)
    gone = 1 - paid["platform"] / honest.total()
    show(f"a set that claims {factor} times what it got: the workers have {gone:.3f} of the charge")


def as_own(said: Any) -> Any:
    """Count what expert sets ran beside the router as the router's own work."""
    own = {one.layer for one in said.expert_work if one.expert_set is None}
    totals: defaultdict[tuple[int, int | None], Counter[int]] = defaultdict(Counter)
    for one in said.expert_work:
        totals[one.layer, None if one.layer in own else one.expert_set].update(one.choices)
    return replace(said, expert_work=tuple(ExpertWork(*holder, dict(n)) for holder, n in totals.items()))


def always(change: Lie) -> Callable[[object], None]:
    """Return what has a LayerActor lie about expert work in every step."""

    def install(stage: object) -> None:
        runner = stage._runner
        honest = runner.run

        def lying(batch, frame):
            output = honest(batch, frame)
            if isinstance(output, Handoff):
                return replace(output, batch=change(output.batch))
            return change(output)

        runner.run = lying

    return install


def test_a_router_that_counts_the_work_of_sets_as_its_own_gains_nothing(running: Running) -> None:
    liar, honest, paid = check_disputed(running, router, always(as_own))

    assert any(
        paid[payout(line["node"])] < honest[payout(line["node"])]
        for line in sets(topology(running[1], MODEL))
    )
    replaced_by_an_honest_one(running, liar)
    show(f"a router that counts other's work as its own: {liar['node']} gains nothing")
