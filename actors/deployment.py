"""One deployed model: its pieces and its pipeline, brought up, kept running and taken down together."""

import asyncio
import logging

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.link import as_azu_error
from actors.pieces import RayPieces, Site
from actors.pipeline import Pipeline
from actors.placement import actor_name, start_on_head
from azu.engine.scheduler import SchedulerConfig
from azu.errors import WorkerLost
from azu.lifecycle.fleet import Replan
from azu.lifecycle.ports import Ran, Route
from azu.planner.admission import refuse_what_never_fits
from azu.protocol.job import Job
from azu.protocol.structure import Structure
from azu.protocol.topology import Loss, Topology
from azu.recovery.repair import Repair
from azu.registry.description import ModelDescription

log = logging.getLogger(__name__)

_PIPELINE_CONCURRENCY = 10_000


class RayDeployment:
    """A running model as the fleet sees it; it repairs itself until a repair is impossible."""

    def __init__(
        self, site: Site, structure: Structure, topology: Topology, pipeline: ActorHandle, replan: Replan
    ) -> None:
        self.structure = structure
        self.topology = topology
        self.broken = False
        self._site = site
        self._pipeline = pipeline
        self._replan = replan
        self._pieces = RayPieces(site, structure, pipeline, self._lost)
        heartbeat = site.policy.heartbeat
        # Room that a dead process held is reported free by the time its node would be dead itself.
        self._repair = Repair(self._pieces, self._move, patience_s=heartbeat.dead_s)
        self._payout_by_node: dict[str, str] = {}
        self._running: set[str] = set()
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def running_jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._running)

    @property
    def route(self) -> Route:
        """Where it runs now; payouts are those of every node that ever ran a piece."""
        return Route(dict(self._payout_by_node), self._pieces.placements())

    async def start(self) -> None:
        """Bring every piece up; raises the first error of those that did not come up."""
        self._note_payouts()
        errors = await self._pieces.try_bring_up(self.topology, _everything(self.topology))
        for error in errors.values():
            raise error
        await self._pipeline.start.remote(self._pieces.stages())
        self._supervisor = asyncio.create_task(self._supervise())

    async def run(self, job: Job) -> Ran:
        """Run a job in the model's pipeline; raises InvalidRequest when its KV would never fit."""
        refuse_what_never_fits(
            self.structure, self.topology, len(job.prompt_token_ids) + job.sampling.max_tokens
        )
        self._running.add(job.job_id)
        try:
            ran: Ran = await self._pipeline.run.remote(job)
        except Exception as error:
            self.broken = self.broken or isinstance(error, RayActorError)
            raise as_azu_error(error, f"the pipeline of {job.model_id}") from error
        finally:
            self._running.discard(job.job_id)
        return ran

    async def cancel(self, job_id: str) -> None:
        """End a job's sequence."""
        await self._pipeline.cancel.remote(job_id)

    def node_died(self, node_id: str) -> None:
        """Hear that a node is dead: what it held is lost."""
        self._pieces.node_died(node_id)

    async def close(self) -> None:
        """Take every piece down and give the VRAM back."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        ray.kill(self._pipeline)
        self._pieces.take_down()

    async def _supervise(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._repair.run())
                tasks.create_task(self._hear_pipeline())
        except* Exception as group:
            fault = "; ".join(str(error) for error in group.exceptions)
            log.exception("%s is given up", self.structure.model_id)
            self.broken = True
            # When it is the pipeline that is gone, its jobs hear of that themselves.
            self._pipeline.fail.remote(WorkerLost(f"{self.structure.model_id} lost a worker: {fault}"))

    async def _hear_pipeline(self) -> None:
        while True:
            try:
                loss, epoch, bad_frame = await self._pipeline.next_loss.remote()
            except Exception as error:
                raise as_azu_error(error, f"the pipeline of {self.structure.model_id}") from error
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
        self.topology = await self._replan(loss)
        self._note_payouts()
        return self.topology

    def _note_payouts(self) -> None:
        nodes = self._site.nodes
        self._payout_by_node |= {
            node_id: nodes[node_id].payout_address for node_id in self.topology.vram_bytes_by_node
        }


class RayBuilder:
    """Brings models up on a site."""

    def __init__(self, site: Site, redis_url: str) -> None:
        """`redis_url` is the pipelines'."""
        self._site = site
        self._redis_url = redis_url

    async def structure(self, model_id: str, revision: str) -> Structure:
        """Return the model's structure, cutting it first when nobody has."""
        try:
            structure: Structure = await self._site.registry.ensure_cut.remote(model_id, revision)
        except Exception as error:
            raise as_azu_error(error, "the registry") from error
        return structure

    async def build(self, structure: Structure, topology: Topology, replan: Replan) -> RayDeployment:
        """Bring up every piece; what was half up is taken down when it fails."""
        try:
            pipeline = await self._start_pipeline(structure, topology)
        except Exception as error:
            raise as_azu_error(error, f"the pipeline of {topology.model_id}") from error
        deployment = RayDeployment(self._site, structure, topology, pipeline, replan)
        try:
            await deployment.start()
        except BaseException as error:
            await deployment.close()
            if isinstance(error, Exception):
                raise as_azu_error(error, f"bringing up {topology.model_id}") from error
            raise
        return deployment

    async def _start_pipeline(self, structure: Structure, topology: Topology) -> ActorHandle:
        policy = self._site.policy
        describing = self._site.registry.describe.remote(structure.model_id, structure.revision)
        described: ModelDescription = await asyncio.wait_for(describing, policy.timeouts.describe_s)
        decoding = self._site.registry.text_decoder.remote(structure.model_id, structure.revision)
        text_decoder: str = await asyncio.wait_for(decoding, policy.timeouts.describe_s)
        return start_on_head(
            Pipeline,
            actor_name("pipeline", topology.model_id, topology.epoch),
            structure,
            topology,
            SchedulerConfig(
                num_blocks=topology.num_blocks,
                block_size=topology.block_size,
                prefill_chunk_tokens=policy.engine.prefill_chunk_tokens,
                max_running=policy.engine.max_running,
            ),
            described.architecture.eos_token_ids,
            text_decoder,
            self._redis_url,
            policy.timeouts.step_s,
            max_concurrency=_PIPELINE_CONCURRENCY,
        )


def _everything(topology: Topology) -> Loss:
    return Loss(
        frozenset(stage.index for stage in topology.stages),
        frozenset(chosen.index for chosen in topology.expert_sets),
    )
