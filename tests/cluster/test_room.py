"""Whatever is placed, repaired, moved or taken over, no more of a node is promised than it lends."""

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from azu.cluster.deployment import Deployment, DeploymentState
from azu.errors import AzuError
from azu.planner.policy import PlanPolicy
from azu.protocol.node import NodeState
from azu.protocol.topology import Piece, PieceSet
from azu.units import MIB
from tests.actors.fake_backend import FakeBackend
from tests.builders import node, structure
from tests.cluster.test_cluster import Network
from tests.cluster.waiting import end_other_tasks, supervisor_at_once

POLICY = PlanPolicy(promised_sequences=2, tokens_per_sequence=128)
MODELS = ("m/one", "m/two", "m/three")  # 12 MiB each on one node
LENT = {"a": 13 * MIB, "b": 17 * MIB, "c": 25 * MIB}
_FIND_S = 0.002
_SETTLED = 5  # steps of the loop after which a repair that is due has begun

Event = tuple[
    str, int, bool
]  # what happens, to which, and whether it has come to an end before the next does


@dataclass
class Held(FakeBackend):
    """A backend that notes what its pieces hold together on each node at most."""

    most: Counter[str] = field(default_factory=Counter)

    async def start(self, name: str, piece: Piece) -> None:
        await super().start(name, piece)
        held: Counter[str] = Counter()
        for one in self.pieces.values():
            held[one.piece.node_id] += one.piece.vram_bytes
        self.most |= held

    async def find(self, name: str) -> bool:
        # Ray takes its time, in which a repair begins of what is taken over already.
        await asyncio.sleep(_FIND_S)
        return await super().find(name)


class World:
    """A network in which things happen, and what was promised on each node at most."""

    def __init__(self, redis_url: str) -> None:
        self.backend = Held()
        for model in MODELS:
            self.backend.structures[model] = structure(4, model_id=model, kv_bytes_per_token=4096)
        nodes = [node(name, lent) for name, lent in LENT.items()]
        self.network = Network(redis_url, policy=POLICY, backend=self.backend, nodes=nodes, room_wait_s=0.0)
        self.promised: Counter[str] = Counter()
        self.jobs: dict[str, Deployment] = {}

    async def happens(self, event: str, which: int, comes_to_an_end: bool) -> None:
        if event == "scheduler and node die":
            end_other_tasks()
            self.kill(which % len(LENT))
            self.network.cluster = self.network.new_cluster()
        happening = asyncio.create_task(self._quietly(event, which))

        steps = 0
        while steps < (_SETTLED if comes_to_an_end else 1):
            await asyncio.sleep(0)
            self.promised |= Counter(self.network.cluster.placed_bytes())
            states = {one.state for one in self.network.cluster.deployments}
            is_over = happening.done() and DeploymentState.RECONCILING not in states
            steps = steps + 1 if is_over or not comes_to_an_end else 0

    def kill(self, place: int) -> None:
        """End a node and the processes of all its pieces."""
        nodes = self.network.nodes
        nodes[place] = replace(nodes[place], state=NodeState.DEAD)
        for name, one in list(self.backend.pieces.items()):
            if one.piece.node_id == nodes[place].node_id:
                self.backend.pieces.pop(name).died.set()

    async def _quietly(self, event: str, which: int) -> None:
        with suppress(AzuError):
            await self._happens(event, which)

    async def _happens(self, event: str, which: int) -> None:
        cluster, nodes = self.network.cluster, self.network.nodes
        standing = [one for one in cluster.deployments if one.state is DeploymentState.SERVING]
        one = standing[which % len(standing)] if standing else None
        place, model = which % len(nodes), MODELS[which % len(MODELS)]
        match event:
            case "job":
                job_id = f"job-{len(self.jobs)}"
                self.jobs[job_id] = await self.network.ensure(model, job_id)
            case "jobs end":
                while self.jobs:
                    job_id, deployment = self.jobs.popitem()
                    deployment.pipeline.let_go(job_id)
            case "more":
                await cluster.add_pipeline(model, "r1")
            case "piece dies" if self.backend.pieces:
                actors = list(self.backend.pieces.values())
                self.backend.end_piece(actors[which % len(actors)])
            case "load fails":
                self.backend.failing = [PieceSet(stages=frozenset({0}))]
            case "node dies":
                self.kill(place)
                cluster.node_died(nodes[place].node_id)
            case "nodes are back":
                nodes[:] = [replace(one, state=NodeState.ALIVE) for one in nodes]
            case "leaves":
                await cluster.vacate(nodes[place].node_id)
            case "moves" if one is not None:
                nodes[place] = replace(nodes[place], memory_bytes_per_s=1e9 * (1 + which))
                await cluster.improve(one)
            case "less KV" if one is not None:
                await one.resize(4)
            case "all KV" if one is not None:
                await one.resize(POLICY.num_blocks)
            case "scheduler and node die":
                await cluster.adopt(supervisor_at_once())


def happenings(*events: str) -> st.SearchStrategy[list[Event]]:
    return st.lists(
        st.tuples(st.sampled_from(events), st.integers(0, 11), st.booleans()), min_size=4, max_size=20
    )


PLACING = (
    "job",
    "jobs end",
    "more",
    "piece dies",
    "load fails",
    "node dies",
    "nodes are back",
    "leaves",
    "moves",
)
ALL = (*PLACING, "less KV", "all KV", "scheduler and node die")


def after(redis_url: str, events: list[Event]) -> World:
    """Return a world after all these events."""

    async def within() -> World:
        world = World(redis_url)
        for event in events:
            await world.happens(*event)
        await world.happens("jobs end", 0, True)
        return world

    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return asyncio.run(within())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(happenings(*PLACING))
def test_pieces_never_hold_more_than_their_node_lends(redis_url: str, events: list[Event]) -> None:
    world = after(redis_url, events)

    assert all(size <= LENT[node_id] for node_id, size in world.backend.most.items())
    assert all(size <= LENT[node_id] for node_id, size in world.promised.items())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(happenings(*ALL))
def test_no_more_is_promised_than_lent_when_kv_changes_and_schedulers_come_and_go(
    redis_url: str, events: list[Event]
) -> None:
    assert all(size <= LENT[node_id] for node_id, size in after(redis_url, events).promised.items())


def test_what_is_taken_over_first_and_repaired_counts_what_is_taken_over_next(redis_url: str) -> None:
    """Two models fill the large node; the node of a third dies with the scheduler."""
    jobs: list[Event] = [("job", model, True) for model in range(len(MODELS))]
    for dies in range(len(LENT)):
        world = after(redis_url, [*jobs, ("scheduler and node die", dies, True)])
        assert all(size <= LENT[node_id] for node_id, size in world.promised.items())
