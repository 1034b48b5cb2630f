"""Scheduler: knows the nodes, deploys models, runs the queue of jobs."""

import asyncio
import logging
import time
from collections.abc import Collection

from ray.actor import ActorHandle

from actors.deployment import RayBackend
from actors.links import raises_known_errors
from actors.node import NodeAgents
from actors.placement import SCHEDULER, request_nodes
from actors.telemetry import (
    RayMeter,
    certificate_ends,
    log_as,
    show_books,
    show_deployments,
    show_head,
    show_jobs,
    show_nodes,
)
from azu.clock import wall_clock_ms
from azu.cluster.canary import CanaryWatch
from azu.cluster.cluster import Cluster
from azu.cluster.deployment import Deployment
from azu.cluster.deployment_store import DeploymentStore
from azu.cluster.earnings import OwnersEarnings
from azu.cluster.nodes import NodeTable, node_called
from azu.cluster.offers import Offers
from azu.cluster.restarts import RestartTurn
from azu.cluster.scaling import (
    Cooldown,
    ExpertReplication,
    KvPressure,
    NodeRequest,
    Rebalance,
    ScaleOut,
    ShareOut,
)
from azu.config import ControlConfig
from azu.errors import NotFound
from azu.jobs.dispatch import Dispatcher
from azu.jobs.redis import RedisJobs
from azu.jobs.settlement import Settlement
from azu.metrics import BAD_FRAMES, LEFT_OUT, UNHEALTHY, MetricsSnapshot, MetricsSum
from azu.money.books import Books, Totals
from azu.protocol.job import DeploymentStatus
from azu.protocol.node import Node, Offer
from azu.protocol.topology import Prediction
from azu.redis_client import connect_redis
from azu.supervision import Supervisor, end_process

log = logging.getLogger(__name__)

_MEASURE_S = 2.0
_ARCHIVE_S = 10.0
_GIVE_BACK_S = 60.0
_COUNT_LENT_S = 60.0


@raises_known_errors
class Scheduler:
    """Composes a Cluster, the checks that change it, and a Dispatcher; runs their loops."""

    def __init__(self, config: ControlConfig) -> None:
        log_as("scheduler")
        self._config = config
        policy = config.policy
        self._nodes = NodeTable(
            suspect_s=policy.heartbeat.suspect_s, dead_s=policy.heartbeat.dead_s, on_dead=self._node_died
        )
        self._agents = NodeAgents(policy.heartbeat, config.home, self._nodes)
        self._store = store = DeploymentStore.from_url(config.redis_url)
        self._earnings = OwnersEarnings()
        self._cluster = Cluster(
            RayBackend(policy, config.pipeline_redis_url, self._agents, self._blame, self._mark),
            lambda placed, given_back: self._nodes.nodes(time.monotonic(), placed, given_back),
            policy.plan_policy(),
            store,
            # Room that a dead process held is reported free by the time its node would be dead itself.
            room_wait_s=policy.heartbeat.dead_s,
            nodes_come=policy.requeue.nodes_come,
            rates=self._earnings.rates,
        )
        self._offers = Offers(self._cluster.would_hold)
        self._node_request = NodeRequest(
            self._cluster, request_nodes, patience_s=2 * policy.requeue.longest_s
        )
        self._kv_pressure = KvPressure(self._cluster, policy.plan_policy())
        self._rebalance = Rebalance(self._cluster, Cooldown(policy.moves.rest_s))
        self._replication = ExpertReplication(self._cluster, Cooldown(policy.moves.rest_s))
        self._share_out = ShareOut(self._cluster, policy.moves.share_s)
        self._scale_out = ScaleOut(self._cluster, policy.kv.promised_sequences, policy.moves.idle_s)
        self._books = Books(config.books_url, connect_redis(config.redis_url))
        self._meter = RayMeter()
        self._supervisor = Supervisor(SCHEDULER, self._meter, end_process)
        self._metrics = MetricsSum()
        self._canary = CanaryWatch(
            self._cluster,
            store,
            self._meter,
            every_s=policy.canary.every_s,
            leave_out=self._leave_node_out,
        )
        self._jobs = jobs = RedisJobs.from_url(config.redis_url)
        self._settlement = Settlement(self._books, jobs, self._earnings.earn)
        self._dispatcher = Dispatcher(
            jobs,
            self._cluster,
            self._settlement,
            consumer="scheduler",
            patience=policy.retry_policy(),
            supervisor=self._supervisor,
        )
        self._restarts = RestartTurn()
        # Both are read once, by Ray and by the ingress, at the network's start.
        self._certificate_ends = certificate_ends(config)
        self._serving: asyncio.Task[None] | None = None
        self._has_adopted = False

    async def start(self) -> None:
        """Begin to follow the nodes, take over an earlier scheduler's deployments, then take jobs."""
        if self._serving is None:
            period_s = self._config.policy.heartbeat.period_s
            self._supervisor.start("nodes", self._agents.follow_nodes, every_s=period_s)
            self._supervisor.start("reports", self._agents.follow_reports, every_s=period_s)
            self._supervisor.start("metrics", self._measure, every_s=_MEASURE_S)
            self._serving = asyncio.create_task(self._serve())

    async def ready(self) -> bool:
        """Say whether jobs can be run: no loop is unhealthy and a node is there that has reported."""
        return self._has_adopted and self._agents.has_reports and self._supervisor.is_healthy

    async def nodes(self) -> tuple[Node, ...]:
        """Return the nodes as the planner sees them, and those that left just now."""
        now_s = time.monotonic()
        return self._nodes.nodes(now_s, self._cluster.placed_bytes()) + self._nodes.left(now_s)

    async def prediction(self, model_id: str, revision: str) -> Prediction | None:
        """Return what the planner expects of a running model's topology, None for one that does not run."""
        for deployment in self._cluster.deployments:
            topology = deployment.topology
            if (topology.model_id, topology.revision) == (model_id, revision) and not deployment.broken:
                return topology.prediction
        return None

    async def deployments(self) -> list[DeploymentStatus]:
        """Return what stands of each model, and which models are being deployed."""
        standing = [
            DeploymentStatus(
                model_id=one.topology.model_id,
                revision=one.topology.revision,
                state=_state(one),
                epoch=one.topology.epoch,
                num_layers=one.structure.num_layers,
                placements=one.placements(),
                node_ids=one.pieces.node_ids(),
            )
            for one in self._cluster.deployments
        ]
        return standing + [DeploymentStatus(*model, state="deploying") for model in self._cluster.deploying]

    async def leave(self, name: str, address: str | None) -> bool:
        """Have a node take nothing new and give away what it holds; False while it still holds something.

        With an `address` only a node that pays this address is taken. Raises NotFound for any other node, and
        Conflict where more than one has the name.
        """
        node_id, agent = self._agent_of(name, address)
        await agent.leave.remote()
        return node_id not in self._cluster.placed_bytes()

    async def pause(self, name: str, address: str | None) -> bool:
        """Have a node give away what it holds, and take nothing until `resume`; else as `leave`."""
        node_id, agent = self._agent_of(name, address)
        await agent.pause.remote()
        return node_id not in self._cluster.placed_bytes()

    async def resume(self, name: str, address: str | None) -> None:
        """Have a node that its owner paused lend again; raises as `leave` does."""
        await self._agent_of(name, address)[1].resume.remote()

    async def offer(self, vram_bytes: int, memory_bytes_per_s: float, flops_per_s: float) -> Offer:
        """Return what a node of this memory and speed would hold, and what owners earn."""
        node = Node("", "", "", vram_bytes, vram_bytes, memory_bytes_per_s, flops_per_s)
        return Offer(await self._offers.layers(node.checked(vram_bytes)), self._earnings.mean)

    def _agent_of(self, name: str, address: str | None) -> tuple[str, ActorHandle]:
        agents = self._agents.by_node
        nodes = (one for one in self._agents.nodes.values() if one.node_id in agents)
        node = node_called(name, (one for one in nodes if address in (None, one.payout_address)))
        return node.node_id, agents[node.node_id]

    async def restart(self, name: str, hosts: Collection[str]) -> tuple[bool, bool]:
        """Give a node on one of the `hosts` its turn to be started again; it then gives away what it holds.

        Return whether it has the turn, and whether it holds nothing any more. Raises NotFound.
        """
        agents, where = self._agents.by_node, self._agents.hosts
        living = self._agents.nodes.keys() & agents.keys() & where.keys()
        names = {node_id: self._agents.nodes[node_id].name for node_id in living}
        mine = [node_id for node_id in sorted(living) if names[node_id] == name and where[node_id] in hosts]
        if not mine:
            raise NotFound(f"no node {name} of yours lends here", param="name")
        if not self._restarts.take(mine[0], names, time.monotonic()):
            return False, False
        await agents[mine[0]].leave.remote()
        return True, mine[0] not in self._cluster.placed_bytes()

    async def take_metrics(self, source: str, snapshot: MetricsSnapshot) -> None:
        """Take a snapshot of another process's meter."""
        self._metrics.record(source, snapshot, time.monotonic())

    async def problems(self) -> tuple[str, ...]:
        """Return what cannot go on: loops of a process, which is being replaced, and nodes left alone."""
        values = self._metrics.total(time.monotonic()).values
        failing = sorted(
            labels[0] for (name, labels), loops in values.items() if name == UNHEALTHY.name and loops
        )
        loops = tuple(f"the {component} has a loop that fails again and again" for component in failing)
        return loops + self._agents.problems()

    async def metrics(self) -> MetricsSnapshot:
        """Return the metrics of all processes of the network together."""
        return self._metrics.total(time.monotonic())

    async def _serve(self) -> None:
        await self._supervisor.insist("adoption", self._learn)
        await self._cluster.adopt(self._supervisor)
        self._has_adopted = True
        start, policy = self._supervisor.start, self._config.policy
        start("KV", self._check_kv, every_s=policy.heartbeat.period_s)
        start("node requests", self._check_nodes, every_s=policy.heartbeat.period_s)
        start("places", self._check_places, every_s=policy.moves.look_s)
        start("canary", self._canary.check, every_s=policy.heartbeat.period_s)
        start("lending", self._count_lent, every_s=_COUNT_LENT_S)
        start("old jobs", self._archive, every_s=_ARCHIVE_S)
        start("lost jobs", self._settlement.give_back, every_s=_GIVE_BACK_S)
        start("jobs", self._dispatcher.run)

    async def _archive(self) -> None:
        """Keep neither prompts nor answers for longer than the network's policy says."""
        await self._jobs.archive(wall_clock_ms(), self._config.policy.retention_s * 1000)

    async def _learn(self) -> None:
        """Learn what the earlier scheduler kept, and which nodes there are."""
        self._earnings.by_owner = (await self._store.earnings()).by_owner
        await self._agents.first_reports()

    async def _count_lent(self) -> None:
        """Count what each owner lends; it decides with what they earned whose nodes come next."""
        now_s = time.monotonic()
        self._earnings.lend(self._nodes.nodes(now_s, {}), now_s)
        await self._store.keep_earnings(self._earnings)

    async def _measure(self) -> None:
        """Show nodes, jobs and books in the metrics."""
        try:
            show_nodes(self._meter, await self.nodes())
            show_deployments(self._meter, await self.deployments())
            show_head(self._meter, self._config.home, self._certificate_ends)
            show_jobs(self._meter, self._dispatcher.num_waiting, self._dispatcher.num_running)
            totals: Totals | None = None
            try:
                totals = await self._books.totals()
            finally:
                show_books(self._meter, totals)
            if shown := await self._books.treasury_metrics():
                await self.take_metrics(*shown)
        finally:
            self._meter.export()
            await self.take_metrics(SCHEDULER, self._meter.snapshot())

    async def _check_kv(self) -> None:
        """Keep deployments within the room that their nodes have."""
        now_s = time.monotonic()
        for node_id in self._nodes.marks.judge(self._cluster.placed_bytes(), now_s):
            log.warning("node %s alone computed values that are not finite", node_id[:8])
            self._nodes.blame(node_id, now_s)
        await self._kv_pressure.check(self._nodes.reports(now_s), now_s)

    async def _check_nodes(self) -> None:
        """Request nodes while jobs find no room."""
        await self._node_request.check(self._agents.lent_bytes.values(), self._dispatcher.num_waiting)

    async def _check_places(self) -> None:
        """Have deployments use places that are better now than theirs."""
        await self._rebalance.check()
        await self._share_out.check()
        await self._scale_out.check()
        await self._replication.check()

    def _blame(self, node_id: str) -> None:
        """Count a bad frame against the node that sent it."""
        self._nodes.blame(node_id, time.monotonic())
        if node := self._agents.nodes.get(node_id):
            log.warning("node %s sent a bad frame", node.name)
            self._meter.count(BAD_FRAMES, 1, node.name)

    def _leave_node_out(self, node_id: str) -> None:
        """Give a node no pieces for an hour: without it the canary's tokens are right."""
        self._nodes.leave_out(node_id, time.monotonic())
        name = node.name if (node := self._agents.nodes.get(node_id)) else node_id[:8]
        log.error("node %s changes tokens: it is left out", name)
        self._meter.count(LEFT_OUT, 1, name)

    def _mark(self, node_id: str, model_id: str, layer: int, owner: str) -> None:
        log.warning("node %s: values of %s, layer %d, are not finite", node_id[:8], model_id, layer)
        self._nodes.marks.mark((model_id, layer), node_id, owner, time.monotonic())

    def _node_died(self, node_id: str) -> None:
        log.warning("node %s is dead", node_id[:8])
        self._cluster.node_died(node_id)
        self._agents.node_died(node_id)


def _state(deployment: Deployment) -> str:
    if deployment.broken:
        return "broken"
    return "slow" if deployment.pieces.is_slow else "running"
