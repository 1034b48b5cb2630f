"""One deployed model: its pieces and its pipeline, brought up, kept running and taken down together."""

import asyncio
import logging
from dataclasses import replace

from actors.link import as_azu_error
from actors.pieces import RayPieces
from actors.placement import sweep
from actors.reach import REGISTRY, ask
from actors.seat import PipelineSeat
from actors.site import Site
from azu.errors import AzuError, WorkerLost
from azu.lifecycle.deployed import Commit, Replan
from azu.lifecycle.ports import Ran, Route
from azu.lifecycle.standing import Standing, StandingModels
from azu.planner.admission import refuse_what_never_fits
from azu.planner.hot_experts import Counts
from azu.planner.moves import Change
from azu.planner.shrink import with_blocks
from azu.protocol.job import Job
from azu.protocol.structure import Structure
from azu.protocol.topology import Loss, Topology
from azu.recovery.repair import Repair

log = logging.getLogger(__name__)


class RayDeployment:
    """A running model as the fleet sees it; it repairs itself until a repair is impossible."""

    def __init__(
        self, site: Site, standing: StandingModels, structure: Structure, topology: Topology, replan: Replan
    ) -> None:
        self.structure = structure
        self.topology = topology
        self.broken = False
        self._site = site
        self._standing = standing
        self._replan = replan
        self._seat = PipelineSeat(site.policy, site.redis_url, structure, topology)
        self._pieces = RayPieces(site, structure, self._seat, lost=self._lost, resumed=self._write_down)
        heartbeat = site.policy.heartbeat
        # Room that a dead process held is reported free by the time its node would be dead itself.
        self._repair = Repair(self._pieces, self._move, patience_s=heartbeat.dead_s)
        self._num_blocks = topology.num_blocks
        self._payout_by_node: dict[str, str] = {}
        self._running: set[str] = set()
        self._held: frozenset[str] = frozenset()
        self._supervisor: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[bool] | None = None

    @property
    def running_jobs(self) -> int:
        """Jobs that are expected here and were not let go."""
        return len(self._running)

    def expect(self, job_id: str) -> None:
        """Hear that a job is going to run here."""
        self._running.add(job_id)

    def let_go(self, job_id: str) -> None:
        """Hear that nobody waits for a job here any more, whether it ran or not."""
        self._running.discard(job_id)

    def holds(self, job_id: str) -> bool:
        """Whether a job runs here, or did without coming to an end: nobody else may run it."""
        return job_id in self._running or job_id in self._held

    @property
    def route(self) -> Route:
        """Where it runs now; payouts are those of every node that ever ran a piece."""
        return Route(dict(self._payout_by_node), self._pieces.placements())

    async def start(self) -> None:
        """Bring every piece up; raises the first error of those that did not come up."""
        self._note_payouts()
        await self._seat.start()
        errors = await self._pieces.try_bring_up(self.topology, _everything(self.topology))
        for error in errors.values():
            raise error
        await self._seat.begin(self._pieces.stages())
        await self._write_down(self.topology)
        self._supervisor = asyncio.create_task(self._supervise())

    async def adopt(self, standing: Standing) -> None:
        """Take over what somebody else brought up; what of it is gone is brought up again."""
        self._payout_by_node |= standing.payout_by_node
        await self._seat.adopt(standing.pipeline)
        self._held = await self._seat.jobs()
        self._lost(await self._pieces.adopt(standing.topology, standing.pieces))
        self._repair.again(is_fault=False)
        self._supervisor = asyncio.create_task(self._supervise())

    async def run(self, job: Job) -> Ran:
        """Run a job in the model's pipeline; raises InvalidRequest when its KV would never fit."""
        planned = self._site.policy.plan_policy()
        num_tokens = len(job.prompt_token_ids) + job.sampling.max_tokens
        refuse_what_never_fits(
            self.structure, replace(self.topology, num_blocks=planned.num_blocks), num_tokens
        )
        self._held |= {job.job_id}
        ran = await self._seat.run(job)
        self._held -= {job.job_id}
        return ran

    async def num_chosen(self) -> Counts:
        """Ask the stages how often each expert was chosen."""
        return await self._pieces.num_chosen()

    async def resize(self, num_blocks: int) -> None:
        """Have another number of KV blocks, under a new epoch; those that sequences need alone are kept."""
        self._num_blocks = await self._seat.limit(num_blocks)
        self._repair.again(is_fault=False)

    async def move(self, change: Change, commit: Commit, *, beside: bool) -> bool:
        """Go over to other places, brought up `beside` what runs if there is room for both.

        False when it came to nothing: a piece was lost or did not come up, or the model was closed.
        """
        self._moving = asyncio.create_task(self._go_over(change, commit, beside=beside))
        await asyncio.wait({self._moving})
        return not self._moving.cancelled() and self._moving.result()

    async def cancel(self, job_id: str) -> None:
        """End a job's sequence."""
        await self._seat.cancel(job_id)

    def node_died(self, node_id: str) -> None:
        """Hear that a node is dead: what it held is lost."""
        self._pieces.node_died(node_id)

    async def close(self) -> None:
        """Take every piece down and give the VRAM back."""
        await self._standing.forget(self.topology)
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._moving is not None:
            self._moving.cancel()
        self._seat.close()
        self._pieces.take_down()

    async def _supervise(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._repair.run())
                tasks.create_task(self._hear_pipeline())
        except* AzuError as group:
            fault = "; ".join(str(error) for error in group.exceptions)
            log.error("%s is given up: %s", self.structure.model_id, fault)
            self.broken = True
            if self._moving is not None:
                self._moving.cancel()
            await self._seat.give_up(WorkerLost(f"{self.structure.model_id} lost a worker: {fault}"))

    async def _hear_pipeline(self) -> None:
        while True:
            sitting = self._seat.sitting
            try:
                loss, epoch, bad_frame = await self._seat.next_loss()
            except AzuError as error:
                log.warning("%s", error.message)
                self._repair.again(is_fault=True)
                await self._seat.another(than=sitting)
                continue
            lost = self._pieces.still_there(loss, epoch)
            if bad_frame:
                for node_id in self._pieces.nodes_of(lost):
                    self._site.blame(node_id)
            self._lost(lost)

    def _lost(self, loss: Loss) -> None:
        self._repair.lost(loss)

    async def _move(self, loss: Loss) -> Topology:
        # What died may have died with its whole node, which nobody has missed yet.
        await self._site.probe(self.topology.vram_bytes_of(loss))
        return self._take(await self._replan(loss))

    async def _go_over(self, change: Change, commit: Commit, *, beside: bool) -> bool:
        now = self.topology

        async def switch() -> Topology:
            return self._take(await commit())

        try:
            planned = with_blocks(self.structure, change.topology, self._num_blocks)
            if beside and not await self._pieces.prepare(planned, change.fresh):
                return False
            return self.topology is now and await self._repair.move(change, switch)
        finally:
            self._pieces.discard()

    def _take(self, topology: Topology) -> Topology:
        self.topology = with_blocks(self.structure, topology, self._num_blocks)
        self._note_payouts()
        return self.topology

    def _note_payouts(self) -> None:
        nodes = self._site.nodes
        # Whoever is not heard of any more was noted when it ran something.
        self._payout_by_node |= {
            node_id: nodes[node_id].payout_address
            for node_id in self.topology.vram_bytes_by_node
            if node_id in nodes
        }

    async def _write_down(self, topology: Topology) -> None:
        """Keep what stands where for whoever schedules next."""
        pieces = self._pieces.standing()
        await self._standing.keep(Standing(topology, pieces, self._seat.name, self._payout_by_node))


class RayBuilder:
    """Brings models up on a site, and writes down which stand."""

    def __init__(self, site: Site, standing: StandingModels) -> None:
        self._site = site
        self._standing = standing

    async def structure(self, model_id: str, revision: str) -> Structure:
        """Return the model's structure, cutting it first when nobody has."""
        timeout_s = self._site.policy.timeouts.fetch_s
        structure: Structure = await ask(REGISTRY, "ensure_cut", model_id, revision, timeout_s=timeout_s)
        return structure

    async def build(self, structure: Structure, topology: Topology, replan: Replan) -> RayDeployment:
        """Bring up every piece; what was half up is taken down when it fails."""
        deployment = RayDeployment(self._site, self._standing, structure, topology, replan)
        try:
            await deployment.start()
        except BaseException as error:
            await deployment.close()
            if isinstance(error, Exception):
                raise as_azu_error(error, f"bringing up {topology.model_id}") from error
            raise
        return deployment

    async def adopt(self, structure: Structure, standing: Standing, replan: Replan) -> RayDeployment:
        """Take over a model that stands."""
        deployment = RayDeployment(self._site, self._standing, structure, standing.topology, replan)
        await deployment.adopt(standing)
        return deployment

    async def sweep(self, kept: frozenset[str]) -> frozenset[str]:
        """Take down every piece and pipeline but those of these names; return which of these live."""
        return await asyncio.to_thread(sweep, kept)


def _everything(topology: Topology) -> Loss:
    return Loss(
        frozenset(stage.index for stage in topology.stages),
        frozenset(chosen.index for chosen in topology.expert_sets),
    )
