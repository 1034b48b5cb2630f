"""A node whose pieces change the canary's tokens is found by moving pieces, and left out."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest

from azu.cluster import canary
from azu.cluster.canary import CanaryWatch, KnownTokens, Verdict
from azu.cluster.deployment import Deployment
from azu.engine.canary import CanaryAnswer
from azu.errors import WorkerLost
from azu.metrics import CANARIES, Meter
from azu.protocol.node import NodeState
from azu.units import MIB
from tests.builders import node
from tests.cluster.test_cluster import Network
from tests.cluster.waiting import end_other_tasks, until

MODEL = "m/one"
EVERY_S = 3600.0


def answer(*tokens: int, margin: float = 5.0) -> CanaryAnswer:
    return CanaryAnswer((tokens,), ((margin,) * len(tokens),))


RIGHT, WRONG = answer(1, 2, 3, 4), answer(1, 2, 3, 5)


def nodes(*names: str) -> frozenset[str]:
    return frozenset(names)


def test_tokens_are_known_once_placements_without_a_common_node_agree() -> None:
    known = KnownTokens()

    assert known.take(RIGHT, nodes("a", "b")) is Verdict.PROVISIONAL
    assert known.take(RIGHT, nodes("b", "c")) is Verdict.PROVISIONAL
    assert known.take(WRONG, nodes("c", "d")) is Verdict.PROVISIONAL
    assert known.take(RIGHT, nodes("a", "c")) is Verdict.PROVISIONAL
    assert known.take(RIGHT, nodes("d", "e")) is Verdict.AGREES
    assert known.take(WRONG, nodes("c", "d")) is Verdict.DIFFERS


def test_the_first_answer_is_not_known_because_it_was_the_first() -> None:
    known = KnownTokens()
    known.take(WRONG, nodes("a"))
    known.take(RIGHT, nodes("b"))

    assert known.take(RIGHT, nodes("c")) is Verdict.AGREES
    assert known.known == RIGHT


def test_the_latest_placements_and_models_are_remembered(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "_MOST_MODELS", 2)
    known = KnownTokens()
    for number in range(20):
        known.take(RIGHT, nodes("a", f"other-{number}"))
    assert len(known.seen[0][1]) == 16

    async def scenario() -> None:
        network = Network(redis_url, vram_bytes=256 * MIB)
        watch = Watched(network).watch
        for model_id in ("m/one", "m/two", "m/three"):
            await watch._known_of(await network.ensure(model_id))
        assert [model_id for model_id, *_ in watch._known] == ["m/two", "m/three"]

    asyncio.run(scenario())


def test_a_model_that_is_in_doubt_about_its_tokens_makes_none_known() -> None:
    known = KnownTokens()
    for name in "abc":
        assert known.take(answer(1, 2, 3, 4, margin=0.5), nodes(name)) is Verdict.UNCLEAR
    assert known.seen == []


def test_a_placement_cannot_call_known_tokens_unclear() -> None:
    known = KnownTokens(RIGHT)

    assert known.take(answer(1, 2, 3, 5, margin=0.5), nodes("a")) is Verdict.DIFFERS
    assert known.take(CanaryAnswer((), ()), nodes("a")) is Verdict.DIFFERS


def test_ever_new_answers_are_not_remembered_without_a_bound() -> None:
    known = KnownTokens()
    for number in range(1000):
        known.take(answer(1, 2, 3, number), nodes("a"))

    assert len(known.seen) <= 16


@dataclass
class Watched:
    """A network whose nodes hold half a model each, and the watch over it."""

    network: Network
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meter = Meter()
        self.watch = self.new_watch()

    def new_watch(self) -> CanaryWatch:
        """Return the watch of a scheduler that comes after this one."""
        return CanaryWatch(
            self.network.cluster, self.network.store, self.meter, every_s=EVERY_S, leave_out=self.leave_out,
            clock=lambda: self.network.now_s,
        )  # fmt: skip

    def leave_out(self, node_id: str) -> None:
        self.left_out.append(node_id)
        self.network.nodes = [
            replace(one, state=NodeState.SUSPECT) if one.node_id == node_id else one
            for one in self.network.nodes
        ]

    @property
    def asked(self) -> list[frozenset[str]]:
        """The nodes of each placement that was asked, in order."""
        return self.network.backend.asked

    def results(self) -> dict[str, float]:
        values = self.meter.snapshot().values
        counted = {labels[1]: value for (name, labels), value in values.items() if name == CANARIES.name}
        assert len(counted) == len(Verdict)  # from zero on, or a first answer would be no increase
        return {result: value for result, value in counted.items() if value}

    async def deployed(self, job_id: str = "job-1") -> Deployment:
        deployment = await self.network.ensure(MODEL, job_id)
        deployment.pipeline.let_go(job_id)
        return deployment

    async def further(self) -> Deployment:
        """Return another pipeline of the model, on other nodes."""
        await self.network.cluster.add_pipeline(MODEL, "r1")
        return self.network.cluster.deployments[-1]

    async def settled(self, checks: int = 20) -> None:
        """Have the watch look until it does nothing more for a while."""
        for _ in range(checks):
            await self.watch.check()
            for _ in range(200):
                await asyncio.sleep(0)
            await until(
                lambda: all(one.state.value != "reconciling" for one in self.network.cluster.deployments)
            )


def run(redis_url: str, scenario: Callable[[Watched], Awaitable[None]], names: str = "abcdef") -> None:
    async def within() -> None:
        async with asyncio.timeout(60):
            network = Network(redis_url, nodes=[node(name, 6 * MIB) for name in names])
            await scenario(Watched(network))
            end_other_tasks()

    asyncio.run(within())


def test_every_placement_is_asked_once_and_again_after_its_time(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        await watched.deployed()
        await watched.settled()
        assert len(watched.asked) == 1

        watched.network.now_s += EVERY_S - 1
        await watched.settled()
        assert len(watched.asked) == 1

        watched.network.now_s += 1
        await watched.settled()
        assert len(watched.asked) == 2

    run(redis_url, scenario)


def test_a_placement_that_changes_is_asked_again(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        deployment = await watched.deployed()
        await watched.settled()
        lost = deployment.placements()[0].node
        watched.network.nodes = [one for one in watched.network.nodes if one.node_id != lost]
        watched.network.cluster.node_died(lost)
        await watched.settled()

        assert len(watched.asked) == 2
        assert watched.asked[0] != watched.asked[1]

    run(redis_url, scenario)


def test_jobs_come_first_for_a_while(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        await watched.network.ensure(MODEL)
        await watched.settled()
        assert watched.asked == []

        watched.network.now_s += 10
        await watched.settled()
        assert len(watched.asked) == 1

    run(redis_url, scenario)


@pytest.mark.parametrize("liar", ["stage 0", "stage 1"])
def test_a_node_that_changes_tokens_is_found_and_left_out(redis_url: str, liar: str) -> None:
    async def scenario(watched: Watched) -> None:
        backend = watched.network.backend
        deployment = await watched.deployed()
        await watched.further()
        await watched.settled()
        assert watched.results() == {"provisional": 1, "agrees": 2}

        bad = deployment.placements()[int(liar[-1])].node
        backend.liars = {bad}
        watched.network.now_s += EVERY_S
        await watched.settled()

        assert watched.left_out == [bad]
        assert bad not in deployment.topology.vram_bytes_by_node
        assert all(bad not in placement for placement in watched.asked[-1:])

    run(redis_url, scenario)


def test_a_node_that_was_never_right_is_tried_first(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        backend = watched.network.backend
        deployment = await watched.deployed()
        await watched.further()
        await watched.settled()
        (spare, other) = sorted(
            one.node_id
            for one in watched.network.nodes
            if one.node_id not in watched.network.cluster.placed_bytes()
        )
        backend.liars = {spare}
        lost = deployment.placements()[0].node
        watched.network.leaving = other
        deployment.node_lost(lost)
        watched.network.nodes = [one for one in watched.network.nodes if one.node_id != lost]
        await watched.settled(4)
        before = len(watched.asked)
        watched.network.leaving = None
        watched.network.now_s += 600
        await watched.settled()

        assert watched.left_out == [spare]
        assert len(watched.asked) - before <= 3, "no other node was tried"

    run(redis_url, scenario)


def test_one_wrong_answer_moves_nothing(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        deployment = await watched.deployed()
        await watched.further()
        await watched.settled()
        epoch, backend = deployment.topology.epoch, watched.network.backend
        honest, wrong = backend.canary, iter([True])

        async def once_wrong(pipeline: str) -> CanaryAnswer:
            return WRONG if next(wrong, False) else await honest(pipeline)

        backend.canary = once_wrong  # type: ignore[method-assign]
        watched.network.now_s += EVERY_S
        await watched.settled()

        assert deployment.topology.epoch == epoch
        assert watched.left_out == []

    run(redis_url, scenario)


def test_without_room_elsewhere_the_model_goes_on_and_it_is_tried_again_later(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        deployment = await watched.deployed()
        await watched.further()
        await watched.settled()
        bad = deployment.placements()[0].node
        watched.network.backend.liars = {bad}
        watched.network.now_s += EVERY_S
        await watched.settled()
        assert watched.left_out == []
        assert bad in deployment.topology.vram_bytes_by_node

        watched.network.nodes.append(node("z", 6 * MIB))
        watched.network.now_s += 600
        await watched.settled()
        assert watched.left_out == [bad]

    run(redis_url, scenario, names="abcd")


def test_before_tokens_are_known_no_node_is_left_out(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        deployment = await watched.deployed()
        await watched.settled()
        watched.network.backend.liars = {deployment.placements()[0].node}
        watched.network.now_s += EVERY_S
        await watched.settled()

        assert watched.left_out == []
        assert watched.results() == {"provisional": 2}

    run(redis_url, scenario)


def test_what_answered_before_the_tokens_were_known_is_asked_again(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        first = await watched.deployed()
        bad = first.placements()[0].node
        watched.network.backend.liars = {bad}
        await watched.settled()
        await watched.further()
        await watched.settled()
        assert watched.left_out == []
        await watched.further()
        await watched.settled()

        assert watched.left_out == [bad]

    run(redis_url, scenario, names="abcdefgh")


def test_known_tokens_outlive_the_scheduler(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        deployment = await watched.deployed()
        await watched.further()
        await watched.settled()
        bad = deployment.placements()[0].node
        watched.network.backend.liars = {bad}
        watched.watch = watched.new_watch()
        await watched.settled()

        assert watched.left_out == [bad]

    run(redis_url, scenario)


def test_a_pipeline_without_an_answer_is_asked_again(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        await watched.deployed()
        backend = watched.network.backend
        honest = backend.canary

        async def gone(pipeline: str) -> CanaryAnswer:
            raise WorkerLost("it is gone")

        backend.canary = gone  # type: ignore[method-assign]
        await watched.settled()
        backend.canary = honest  # type: ignore[method-assign]
        await watched.settled()
        assert watched.asked == []
        watched.network.now_s += 30
        await watched.settled()
        assert len(watched.asked) == 1

    run(redis_url, scenario)


def test_a_model_in_doubt_is_left_alone(redis_url: str) -> None:
    async def scenario(watched: Watched) -> None:
        watched.network.backend.clear = False
        await watched.deployed()
        await watched.further()
        await watched.settled()

        assert watched.results() == {"unclear": 2}

    run(redis_url, scenario)
