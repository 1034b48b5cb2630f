"""Scheduler: keeps the nodes' book, deploys models, runs the queue."""

import asyncio
import logging
import time

from actors.deployment import RayBuilder, Site
from actors.node import NodeAgents
from actors.placement import SCHEDULER, request_nodes
from actors.telemetry import RayMeter, log_as, show_books, show_jobs, show_nodes
from azu.cluster.cluster import Cluster
from azu.cluster.deployment_store import RedisStanding
from azu.cluster.nodes import NodeTable
from azu.cluster.scaling import Cooldown, ExpertReplication, KvPressure, NodeRequest, Rebalance, ScaleOut
from azu.config import ControlConfig
from azu.errors import AzuError, NotFound
from azu.jobs.dispatch import Dispatcher
from azu.jobs.redis import RedisJobs
from azu.jobs.settlement import Settlement
from azu.metrics import BAD_FRAMES, MetricsSnapshot, MetricsSum
from azu.money.books import Books
from azu.planner.kv_blocks import KvReduction
from azu.protocol.job import Placement
from azu.protocol.node import Node
from azu.protocol.topology import Prediction

log = logging.getLogger(__name__)

_MEASURE_S = 2.0


class Scheduler:
    """Wraps a Dispatcher and its Fleet."""

    def __init__(self, config: ControlConfig) -> None:
        log_as("scheduler")
        policy = config.policy
        self._config = config
        self._book = NodeTable(
            suspect_s=policy.heartbeat.suspect_s, dead_s=policy.heartbeat.dead_s, on_dead=self._died
        )
        self._agents = agents = NodeAgents(policy.heartbeat, config.home, self._book)
        standing = RedisStanding.from_url(config.redis_url)
        site = Site(
            policy, config.pipeline_redis_url, agents.by_node, agents.nodes, self._blame, agents.probe
        )
        builder = RayBuilder(site, standing)
        self._fleet = Cluster(
            builder,
            lambda placed, given_back: self._book.nodes(time.monotonic(), placed, given_back),
            policy.plan_policy(),
            standing,
            nodes_come=policy.requeue.nodes_come,
        )
        self._growth = NodeRequest(self._fleet, request_nodes, patience_s=2 * policy.requeue.longest_s)
        self._fitting = KvPressure(self._fleet, policy.plan_policy())
        self._moving = Rebalance(self._fleet, Cooldown(policy.moves.rest_s))
        self._replicating = ExpertReplication(self._fleet, Cooldown(policy.moves.rest_s))
        self._widening = ScaleOut(self._fleet, policy.kv.promised_sequences)
        jobs = RedisJobs.from_url(config.redis_url)
        self._books = Books.from_url(config.redis_url)
        self._meter = RayMeter()
        self._together = MetricsSum()
        settlement = Settlement(
            self._books,
            jobs,
            policy.price.lamports_per_token_layer,
            policy.price.platform_percent,
        )
        self._dispatcher = Dispatcher(
            jobs,
            self._growth,
            settlement,
            consumer="scheduler",
            patience=policy.retry_policy(),
            meter=self._meter,
        )
        self._loops: tuple[asyncio.Task[None], ...] = ()
        self._has_adopted = False

    async def start(self) -> None:
        """Begin to hear nodes, take over what an earlier scheduler left, then take jobs."""
        if not self._loops:
            self._loops = (
                asyncio.create_task(self._agents.meet()),
                asyncio.create_task(self._agents.hear()),
                asyncio.create_task(self._serve()),
                asyncio.create_task(self._measure()),
            )

    async def ready(self) -> bool:
        """Say whether jobs can be run: the loops live and a node has reported."""
        return self._has_adopted and bool(self._agents.nodes) and not any(loop.done() for loop in self._loops)

    async def nodes(self) -> tuple[Node, ...]:
        """Return the nodes as the planner sees them."""
        return self._book.nodes(time.monotonic(), self._fleet.placed_bytes())

    async def prediction(self, model_id: str, revision: str) -> Prediction | None:
        """Return what the planner expects of a running model's topology, None for one that does not run."""
        for model in self._fleet.models:
            topology = model.topology
            if (topology.model_id, topology.revision) == (model_id, revision) and not model.broken:
                return topology.prediction
        return None

    async def deployments(self) -> list[tuple[str, str, str, int, int, tuple[Placement, ...]]]:
        """Return (model id, revision, state, epoch, layers, placements) of each model."""
        return [
            (
                model.topology.model_id,
                model.topology.revision,
                "broken" if model.broken else "running",
                model.topology.epoch,
                model.structure.num_layers,
                model.placements(),
            )
            for model in self._fleet.models
        ] + [(model_id, revision, "deploying", 0, 0, ()) for model_id, revision in self._fleet.deploying]

    async def shrink_orders(self) -> tuple[KvReduction, ...]:
        """Return which deployed models have to give up KV, for nodes that have less room than was planned."""
        return self._fitting.orders(self._book.reports())

    async def leave(self, name: str, address: str | None) -> bool:
        """Have a node take nothing new and give away what it holds; False while it still holds something.

        `address` is whose node it has to be, None for anybody's. Raises NotFound for a node that is not here.
        """
        for node_id, node in self._agents.nodes.items():
            agent = self._agents.by_node.get(node_id)
            if agent is not None and node.name == name and address in (None, node.payout_address):
                await agent.leave.remote()
                return node_id not in self._fleet.placed_bytes()
        raise NotFound(f"no node {name} of yours lends here", param="name")

    async def hear(self, source: str, picture: MetricsSnapshot) -> None:
        """Take what another process's meter shows."""
        self._together.record(source, picture, time.monotonic())

    async def picture(self) -> MetricsSnapshot:
        """Return what the network's meters show, all together."""
        return self._together.total(time.monotonic())

    async def _measure(self) -> None:
        """Show nodes, jobs and books."""
        while True:
            try:
                show_nodes(self._meter, await self.nodes())
                show_jobs(self._meter, self._dispatcher.num_waiting, self._dispatcher.num_running)
                show_books(self._meter, await self._books.totals())
            except AzuError as error:
                log.warning("the books cannot be shown: %s", error.message)
            self._meter.export()
            await self.hear(SCHEDULER, self._meter.snapshot())
            await asyncio.sleep(_MEASURE_S)

    async def _fit(self) -> None:
        """Keep what stands within what the nodes have."""
        while True:
            await asyncio.sleep(self._config.policy.heartbeat.period_s)
            try:
                await self._fitting.look(self._book.reports(), time.monotonic())
            except AzuError as error:
                log.warning("models were not fitted to their nodes: %s", error.message)

    async def _move(self) -> None:
        """Have models use what is better now than where they are."""
        while True:
            await asyncio.sleep(self._config.policy.moves.look_s)
            try:
                await self._moving.look()
                await self._widening.look()
                await self._replicating.look(is_short=self._growth.is_short)
            except Exception:
                # What runs goes on where it is, and jobs are taken as ever.
                log.exception("models were not moved")

    async def _grow(self) -> None:
        """Ask for nodes while jobs find no room."""
        while True:
            await asyncio.sleep(self._config.policy.heartbeat.period_s)
            await self._growth.look(self._agents.lent_bytes.values(), self._dispatcher.num_waiting)

    async def _serve(self) -> None:
        await self._agents.first_reports()
        await self._fleet.adopt()
        self._has_adopted = True
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._dispatcher.run())
            tasks.create_task(self._fit())
            tasks.create_task(self._grow())
            tasks.create_task(self._move())

    def _blame(self, node_id: str) -> None:
        """Count a bad frame against the node that sent it."""
        self._book.doubted(node_id, time.monotonic())
        if node := self._agents.nodes.get(node_id):
            log.warning("node %s sent a bad frame", node.name)
            self._meter.count(BAD_FRAMES, 1, node.name)

    def _died(self, node_id: str) -> None:
        log.warning("node %s is dead", node_id[:8])
        self._fleet.node_died(node_id)
        self._agents.died(node_id)
