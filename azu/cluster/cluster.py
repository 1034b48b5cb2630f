"""What is wanted of the nodes: which models are deployed, how often, where and in how much room."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from weakref import WeakValueDictionary

from azu.cluster.backend import DeploymentBackend
from azu.cluster.deployment import Deployment, DeploymentState
from azu.cluster.deployment_store import DeploymentRecord, DeploymentStore
from azu.cluster.liveness import SlowNodes
from azu.cluster.phases import on_the_head
from azu.cluster.repairs import RepairTurns
from azu.errors import AzuError, InsufficientCapacity
from azu.models.status import ModelState, ModelStatus
from azu.planner.fairness import NO_RATES, Rates, fair_plan, fairer_placement
from azu.planner.migration import TopologyChange, better_placement, change_between, have_room
from azu.planner.plan import NEVER_FITS, NO_WORKER, check_total_capacity
from azu.planner.policy import PlanPolicy
from azu.planner.replan import replan
from azu.planner.replicas import (
    ExpertHeat,
    plan_further_pipeline,
    shared,
    takes_spare_room,
    with_hot_replicas,
)
from azu.protocol.node import Node, NodeState
from azu.protocol.phase import JobPhase
from azu.protocol.structure import Structure
from azu.protocol.topology import PieceSet, PipelineKey, Topology, key_of, keys_of
from azu.supervision import AWAY, Supervisor

log = logging.getLogger(__name__)

# At a scheduler's start a registry that is away is waited for so long.
_PATIENCE_S = 300.0

Sizes = Mapping[str, int]  # node id -> bytes
# Returns the nodes with the room that is left beside what is placed on them. The second argument has the
# part of it that is given back and may still be loaded.
Nodes = Callable[[Sizes, Sizes], Sequence[Node]]


@dataclass(frozen=True, slots=True)
class Shortage:
    """What a model lacks on single nodes, in bytes, and when its deployment was tried last, in seconds."""

    missing_bytes: tuple[int, ...]
    tried_s: float


class Capacity:
    """The room that is left beside deployments and promises; the holder of `placing` is the only planner."""

    def __init__(self, nodes: Nodes, deployments: Mapping[PipelineKey, Deployment]) -> None:
        self._nodes = nodes
        self._deployments = deployments
        self.promised: dict[PipelineKey, Sizes] = {}
        # One plan at a time: two plans must not promise the same room.
        self.placing = asyncio.Lock()

    def placed_bytes(self) -> dict[str, int]:
        """Return the VRAM taken on each node by what is deployed or being brought up."""
        placed = [one.topology.vram_bytes_by_node for one in self._deployments.values()]
        return sums([*placed, self.promised_bytes()])

    def promised_bytes(self) -> dict[str, int]:
        """Return the VRAM on each node that is promised to what is not loaded yet."""
        moving = (one.promised_bytes() for one in self._deployments.values())
        return sums([*self.promised.values(), *moving])

    def promise(self, topology: Topology) -> Topology:
        """Keep the room of a pipeline before it is brought up; return it with a number of its own."""
        numbers = {key[2] for key in (*self._deployments, *self.promised) if key[:2] == topology.key[:2]}
        topology = replace(topology, replica=next(number for number in count() if number not in numbers))
        self.promised[topology.key] = topology.vram_bytes_by_node
        return topology

    def promised_nodes(self, model_id: str, revision: str) -> set[str]:
        """Return the nodes with room that is promised to pipelines of a model."""
        sizes = [one for key, one in self.promised.items() if key[:2] == (model_id, revision)]
        return {node_id for one in sizes for node_id in one}

    def now(self, lost: Sizes | None = None) -> Sequence[Node]:
        """Return the nodes with their room; what is lost counts once it is reported free."""
        return self._nodes(sums([self.placed_bytes(), negated(lost or {})]), {})

    def without(self, given_back: Sizes) -> Sequence[Node]:
        """Return the nodes with the room that there would be without some loaded pieces."""
        return self._nodes(sums([self.placed_bytes(), negated(given_back)]), given_back)


class Cluster:
    """The deployments. However many jobs ask for a model at once, it is deployed once; `add_pipeline` deploys
    it again beside the first.
    """

    def __init__(
        self,
        backend: DeploymentBackend,
        nodes: Nodes,
        policy: PlanPolicy,
        store: DeploymentStore,
        *,
        room_wait_s: float,
        nodes_come: bool = False,
        clock: Callable[[], float] = time.monotonic,
        turns: Callable[[], RepairTurns] = RepairTurns,
        rates: Callable[[Sequence[Node]], Rates] = lambda _: NO_RATES,
    ) -> None:
        """Deploy through `backend`; a lost piece waits `room_wait_s` for room on a node.

        Where `nodes_come` no model is refused for its size: an autoscaler may bring larger nodes. The clock
        is in seconds; `turns` makes the turns of a model's repairs. `rates` returns what the owners of nodes
        earned: those who earned least come first.
        """
        self._backend = backend
        self._store = store
        self._policy = policy
        self._room_wait_s = room_wait_s
        self._nodes_come = nodes_come
        self._clock = clock
        self._deployments: dict[PipelineKey, Deployment] = {}  # the least recently used first
        self._nodes = nodes
        self._rates = rates
        # A move pays back within the horizon: for as long a slow node is left alone.
        self._slow = SlowNodes(policy.horizon_s)
        self._capacity = Capacity(self._nodes_now, self._deployments)
        # Of models that are asked for now, and of those that are deployed.
        self._locks = WeakValueDictionary[tuple[str, str], asyncio.Lock]()
        self._turns = WeakValueDictionary[tuple[str, str], RepairTurns]()
        self._new_turns = turns
        # By id and revision; None before a model has places on nodes.
        self.deploying: dict[tuple[str, str], Deployment | None] = {}
        self.shortages: dict[str, Shortage] = {}  # by model id

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """The deployments that are up."""
        return tuple(self._deployments.values())

    def placed_bytes(self) -> dict[str, int]:
        """Return the VRAM taken on each node by what is deployed or being brought up."""
        return self._capacity.placed_bytes()

    def promised_bytes(self) -> dict[str, int]:
        """Return the VRAM on each node that is promised to what is not loaded yet."""
        return self._capacity.promised_bytes()

    async def adopt(self, supervisor: Supervisor) -> None:
        """Take over the deployments of an earlier scheduler; every other actor of a model is killed.

        The nodes must have reported before. What fails on the way is done again, without what was done. A
        model is given up whose structure is not to be had, or whose registry is away for five minutes.
        """
        patient_until_s = self._clock() + _PATIENCE_S
        found = await supervisor.insist("adoption", partial(self._find, patient_until_s))
        # The first that is taken over may need a repair at once: the room of the others counts by then.
        coming = [(self._new(structure, record.topology), record) for structure, record in found]
        self._deployments.update({one.topology.key: one for one, _ in coming})
        for deployment, record in coming:
            await supervisor.insist("adoption", partial(deployment.adopt, record))

    async def _find(self, patient_until_s: float) -> list[tuple[Structure, DeploymentRecord]]:
        """Return what can be taken over; kill every other actor."""
        records = await self._store.all()
        living = await self._backend.sweep(_names(records))
        found: list[tuple[Structure, DeploymentRecord]] = []
        for record in records:
            model_id, revision, _ = record.topology.key
            reason = "none of its actors lives"
            try:
                if living & record.names:
                    found.append((await self._backend.structure(model_id, revision), record))
                    continue
            except AzuError as error:
                if isinstance(error, AWAY) and self._clock() < patient_until_s:
                    raise
                reason = error.message
            log.warning("%s is not taken over: %s", model_id, reason)
            await self._store.forget(record.topology)
        await self._backend.sweep(_names(record for _, record in found))
        return found

    async def ensure(self, model_id: str, revision: str, job_id: str) -> Deployment:
        """Return the deployment for a job; a model that is not deployed is deployed first.

        A job that ran in a pipeline goes there, any other to the pipeline with the fewest jobs. Raises
        InsufficientCapacity when the model does not fit even after idle ones were closed; its code is
        "never_fits" when waiting does not help either.
        """
        async with self._locks.setdefault((model_id, revision), asyncio.Lock()):
            for one in self._pipelines(model_id, revision):
                if one.broken and self._deployments.pop(one.topology.key, None) is one:
                    await one.close()
            if pipelines := self._pipelines(model_id, revision):
                # No other pipeline may run a job that one of them holds.
                deployment = min(
                    pipelines, key=lambda one: (job_id not in one.pipeline.jobs, one.pipeline.num_expected)
                )
            else:
                deployment = await self._deploy(model_id, revision)
            self._deployments[deployment.topology.key] = self._deployments.pop(deployment.topology.key)
            deployment.pipeline.expect(job_id)
            return deployment

    async def phase_of(self, model_id: str, revision: str) -> JobPhase:
        """Return how far the start of a model is that a job waits for."""
        if (coming := self.deploying.get((model_id, revision))) is not None and coming.phase is not None:
            return coming.phase
        if not self._nodes_come and not any(one.state is NodeState.ALIVE for one in self._capacity.now()):
            return JobPhase("queued", NO_WORKER)
        try:
            return on_the_head(await self._backend.status(model_id))
        except AzuError as error:
            log.info("how far %s is is not known: %s", model_id, error.message)
            return on_the_head(ModelStatus(model_id, revision, ModelState.UNKNOWN))

    def beside(self, deployment: Deployment) -> Deployment | None:
        """Return another deployment of the same model that serves, if there is one; they share no nodes."""
        model_id, revision, _ = deployment.topology.key
        others = (one for one in self._pipelines(model_id, revision) if one is not deployment)
        return next((one for one in others if not one.broken), None)

    def keep_jobs(self, job_ids: Container[str]) -> list[tuple[Deployment, str]]:
        """Have each deployment forget the jobs that it counts or runs beside these: they are over.

        Returns those that are to be cancelled, with their deployments.
        """
        known = [(one, job_id) for one in self.deployments for job_id in one.pipeline.jobs]
        return [(one, job_id) for one, job_id in known if job_id not in job_ids and one.drop(job_id)]

    async def add_pipeline(self, model_id: str, revision: str) -> None:
        """Deploy one more pipeline of a running model on nodes of its own, where there are some.

        Other models keep the room that they need if a node dies; this one goes on in its other pipeline.
        """
        async with self._capacity.placing:
            running = self._pipelines(model_id, revision)
            if not running:
                return
            structure, topologies = running[0].structure, [one.topology for one in running]
            nodes = self._capacity.now()
            coming = self._capacity.promised_nodes(model_id, revision)
            unused = [one for one in nodes if one.node_id not in coming]
            epoch = await self._store.next_epoch()
            others = [(one.structure, one.topology) for one in self.deployments if one not in running]
            rates, policy = self._rates(unused), self._policy

            def further() -> Topology | None:
                found = plan_further_pipeline(structure, topologies, unused, policy, epoch=epoch, rates=rates)
                spare = found and not takes_spare_room(found.vram_bytes_by_node, others, nodes, policy)
                return found if spare else None

            # Meanwhile streams go on: KV may have taken the room.
            topology = await asyncio.to_thread(further)
            if topology is None or not have_room(topology.vram_bytes_by_node, self._capacity.now()):
                return
            topology = self._capacity.promise(topology)
        log.warning("%s gets pipeline %d", model_id, topology.replica)
        await self._bring_up(self._new(structure, topology))

    async def close_further(self, deployment: Deployment) -> None:
        """Close an idle pipeline of a model that has another one which serves."""
        others = [one for one in self._pipelines(*deployment.topology.key[:2]) if one is not deployment]
        if deployment.is_idle and any(one.state is DeploymentState.SERVING for one in others):
            log.warning("%s gives up pipeline %d: it is idle", *deployment.topology.key[::2])
            del self._deployments[deployment.topology.key]
            await deployment.close()

    def node_died(self, node_id: str) -> None:
        """Have every deployment give up what is on a dead node."""
        for deployment in self.deployments:
            deployment.node_lost(node_id)

    async def vacate(self, node_id: str, *, closes_idle: bool = False) -> bool:
        """Move what is on a node elsewhere, as far as there is room; say whether anything goes.

        Streams wait while what moves is loaded and filled; what finds no room stays where it is. With
        `closes_idle` a model without a job is closed then.
        """
        async with self._capacity.placing:
            goes = False
            for deployment in self.deployments:
                key = deployment.topology.key
                if self._deployments.get(key) is not deployment:
                    continue  # it went while another one was closed
                try:
                    goes |= self._move_off(deployment, node_id)
                except InsufficientCapacity as error:
                    if not closes_idle or not deployment.is_idle:
                        log.info("what is on %s stays: %s", node_id[:8], error.message)
                        continue
                    log.warning("closing %s: only %s has room for it", key[0], node_id[:8])
                    del self._deployments[key]
                    await deployment.close()
                    goes = True
            return goes

    async def move_off(self, deployment: Deployment, node_id: str) -> bool:
        """Replace what a deployment has on a node by pieces elsewhere; say whether there is room for them."""
        async with self._capacity.placing:
            if self._deployments.get(deployment.topology.key) is not deployment:
                return False
            try:
                return self._move_off(deployment, node_id)
            except InsufficientCapacity:
                return False

    def _move_off(self, deployment: Deployment, node_id: str) -> bool:
        """Replace what a deployment has on a node, in room elsewhere that is promised to it till then.

        Returns False where it has nothing there; raises InsufficientCapacity where there is no room.
        """
        before = deployment.topology
        if not (pieces := before.on_node(node_id)):
            return False
        if deployment.broken:
            raise InsufficientCapacity(f"{before.model_id} is given up")
        if moving := pieces - deployment.being_replaced:
            others = [node for node in self._capacity.now() if node.node_id != node_id]
            moved = replan(deployment.structure, before, moving, others, self._policy, epoch=before.epoch + 1)
            deployment.move_off(
                node_id, [piece for piece in moved.pieces if key_of(piece) in keys_of(moving)]
            )
        return True

    async def would_hold(self, node: Node) -> dict[str, tuple[int, int]]:
        """Return what of the deployed models a node would hold that joins: id -> (layers, all layers).

        Each model is planned as if it came up now, beside the others.
        """
        held: dict[str, tuple[int, int]] = {}
        for deployment in self.deployments:
            before = deployment.topology
            nodes = [*self._capacity.without(before.vram_bytes_by_node), node]
            rates, structure = self._rates(nodes), deployment.structure
            try:
                planned = await asyncio.to_thread(fair_plan, structure, nodes, self._policy, rates)
            except InsufficientCapacity:
                continue
            layers = sum(len(stage.span) for stage in planned.stages if stage.node_id == node.node_id)
            if layers:
                held[before.model_id] = layers, structure.num_layers
        return held

    async def improve(self, deployment: Deployment) -> bool:
        """Move a deployment to where a plan over the present nodes has it, if that is worth it.

        It serves meanwhile, except while what moves is filled. Returns whether a move was tried.
        """
        return await self._move(deployment, better_placement)

    async def share_out(self, deployment: Deployment) -> bool:
        """Move a deployment to nodes of owners who earned much less, where it is as fast; see `improve`."""
        rates = self._rates(self._capacity.now())
        return await self._move(deployment, partial(fairer_placement, rates=rates))

    async def replicate(self, deployment: Deployment, heat: ExpertHeat) -> bool:
        """Hold the hot experts of a deployment a second time where no model needs the room, and no others.

        Returns whether a change was tried.
        """
        before = deployment.topology
        nodes = self._capacity.without(before.vram_bytes_of(before.replicas))
        models = [(one.structure, one.topology) for one in self.deployments]

        def wanted() -> Topology:
            hot = with_hot_replicas(deployment.structure, before, nodes, self._policy, heat)
            for one in (hot, before):
                if not takes_spare_room(one.vram_bytes_of(one.replicas), models, nodes, self._policy):
                    return one
            return before.without(before.replicas)

        change = change_between(before, await asyncio.to_thread(wanted))
        return bool(change.gone or change.fresh) and await self._change(deployment, before, change)

    async def close(self) -> None:
        """Close every deployment."""
        while self._deployments:
            _, deployment = self._deployments.popitem()
            await deployment.close()

    def _nodes_now(self, placed: Sizes, given_back: Sizes) -> Sequence[Node]:
        """Return the nodes with their room, and the speed that they have now."""
        now_s = self._clock()
        for one in self.deployments:
            self._slow.note(one.pieces.slow_factors(), now_s)
        return self._slow.slowed(self._nodes(placed, given_back), now_s)

    def _siblings(self, deployment: Deployment) -> list[Topology]:
        """Return where the other pipelines of a deployment's model are."""
        model = deployment.topology.key[:2]
        return [one.topology for one in self._pipelines(*model) if one is not deployment]

    def _pipelines(self, model_id: str, revision: str) -> list[Deployment]:
        return [one for key, one in self._deployments.items() if key[:2] == (model_id, revision)]

    def _new(self, structure: Structure, topology: Topology) -> Deployment:
        return Deployment(
            self._backend,
            self._store,
            structure,
            topology,
            place=self._place_lost,
            commit=self._commit,
            turns=self._turns.setdefault(topology.key[:2], self._new_turns()),
            num_planned_blocks=self._policy.num_blocks,
            room_wait_s=self._room_wait_s,
        )

    async def _deploy(self, model_id: str, revision: str) -> Deployment:
        self.deploying[model_id, revision] = None
        try:
            structure = await self._backend.structure(model_id, revision)
            async with self._capacity.placing:
                topology = self._capacity.promise(await self._plan(structure))
            deployment = self.deploying[model_id, revision] = self._new(structure, topology)
            await self._bring_up(deployment)
        except InsufficientCapacity as error:
            self.shortages[model_id] = Shortage(error.missing_bytes, self._clock())
            raise
        finally:
            self.deploying.pop((model_id, revision), None)
        self.shortages.pop(model_id, None)
        return deployment

    async def _bring_up(self, deployment: Deployment) -> None:
        """Start every actor of a deployment; what was half up is closed when that fails."""
        key = deployment.topology.key
        try:
            await deployment.start()
            self._deployments[key] = deployment
        except BaseException:
            await deployment.close()
            raise
        finally:
            self._capacity.promised.pop(key, None)

    async def _plan(self, structure: Structure) -> Topology:
        def plan_on(nodes: Sequence[Node], rates: Rates, epoch: int) -> Topology:
            try:
                return fair_plan(structure, nodes, self._policy, rates, epoch=epoch)
            except InsufficientCapacity:
                if not self._nodes_come:
                    check_total_capacity(structure, nodes, self._policy)
                raise

        async def on(nodes: Sequence[Node], epoch: int) -> Topology:
            topology = await asyncio.to_thread(plan_on, nodes, self._rates(nodes), epoch)
            if have_room(topology.vram_bytes_by_node, self._capacity.now()):
                return topology
            # Meanwhile streams went on: KV took the room, or a node died.
            now = self._capacity.now()
            return plan_on(now, self._rates(now), epoch)

        return await self._with_room((structure.model_id, structure.revision, 0), on, {})

    async def _place_lost(self, deployment: Deployment, lost: PieceSet) -> None:
        """Find places for what a deployment lost, under a newer epoch."""
        async with self._capacity.placing:
            before, wanted = deployment.topology, deployment.resized
            staying = before.piece_set - lost
            growth = sums([wanted.vram_bytes_of(staying), negated(before.vram_bytes_of(staying))])
            promised = deployment.promised_bytes(lost)
            if wanted.num_blocks > before.num_blocks and not have_room(growth, self._capacity.now(promised)):
                # The room for more KV was promised elsewhere meanwhile.
                deployment.forgo_blocks()
                wanted, growth = before, {}

            siblings = self._siblings(deployment)
            avoided = deployment.pieces.avoided.union(*(one.vram_bytes_by_node for one in siblings))

            async def on(nodes: Sequence[Node], epoch: int) -> Topology:
                return replan(
                    deployment.structure, wanted, lost, nodes, self._policy, epoch=epoch, avoided=avoided
                )

            given_back = sums([before.vram_bytes_of(lost), negated(growth), promised])
            deployment.set_topology(await self._with_room(before.key, on, given_back))

    async def _move(self, deployment: Deployment, chosen: Callable[..., TopologyChange | None]) -> bool:
        before = deployment.topology
        nodes = shared(self._capacity.without(before.vram_bytes_by_node), self._siblings(deployment))
        # A plan takes a second where there are a thousand nodes.
        change = await asyncio.to_thread(chosen, deployment.structure, before, nodes, self._policy)
        return change is not None and await self._change(deployment, before, change)

    async def _change(self, deployment: Deployment, before: Topology, change: TopologyChange) -> bool:
        """Change a deployment's places if there is room and it is as it was; say if that was tried."""
        key = before.key
        async with self._capacity.placing:
            if self._deployments.get(key) is not deployment or deployment.topology is not before:
                return False
            given_back = before.vram_bytes_of(change.gone)
            beside = have_room(change.fresh_bytes, self._capacity.now())
            if not beside and not have_room(change.fresh_bytes, self._capacity.without(given_back)):
                return False
            change = replace(change, topology=await self._with_epoch(change.topology))
            needed = sums([change.fresh_bytes, {} if beside else negated(given_back)])
            self._capacity.promised[key] = needed
        try:
            await deployment.change(change, beside=beside)
        finally:
            if self._capacity.promised.get(key) is needed:
                del self._capacity.promised[key]
        return True

    async def _commit(self, deployment: Deployment, topology: Topology) -> None:
        """Make a changed topology the current one, under an epoch that is newer than those of its pieces."""
        async with self._capacity.placing:
            topology = await self._with_epoch(topology)
            self._capacity.promised.pop(topology.key, None)
            deployment.forgo_blocks()  # what stays would grow, and its room is not promised
            deployment.set_topology(topology)

    async def _with_epoch(self, topology: Topology) -> Topology:
        return replace(topology, epoch=await self._store.next_epoch())

    async def _with_room(
        self, key: PipelineKey, on: Callable[[Sequence[Node], int], Awaitable[Topology]], given_back: Sizes
    ) -> Topology:
        """Plan on the nodes as they are; while there is no room, idle deployments of others are closed.

        An idle deployment is repaired without closing another one: no job would gain by it.
        """
        own = self._deployments.get(key)
        while True:
            epoch = await self._store.next_epoch()
            try:
                # The memory of what is lost may still be taken: it counts as room once it is reported free.
                return await on(self._capacity.now(given_back), epoch)
            except InsufficientCapacity as error:
                idle = [other for other, one in self._deployments.items() if other != key and one.is_idle]
                if not idle or error.code == NEVER_FITS or (own is not None and own.is_idle):
                    raise
                log.info("closing %s to make room for %s", idle[0][0], key[0])
                await self._deployments.pop(idle[0]).close()


def negated(sizes: Sizes) -> Sizes:
    """Return what gives as much as `sizes` take."""
    return {node_id: -size for node_id, size in sizes.items()}


def sums(sizes: Iterable[Sizes]) -> dict[str, int]:
    """Return what several take together."""
    total: Counter[str] = Counter()
    for by_node in sizes:
        total.update(by_node)
    return dict(total)


def _names(records: Iterable[DeploymentRecord]) -> frozenset[str]:
    return frozenset[str]().union(*(one.names for one in records))
