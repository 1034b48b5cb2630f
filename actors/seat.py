"""The one pipeline of a deployed model, whoever sits there now."""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.link import as_azu_error
from actors.pipeline import Pipeline
from actors.placement import actor_name, start_on_head
from actors.reach import REGISTRY, ask, find
from azu.config import NetworkPolicy
from azu.engine.scheduler import SchedulerConfig
from azu.errors import AzuError, DeadlineExceeded, WorkerLost
from azu.lifecycle.ports import Ran
from azu.protocol.job import Job
from azu.protocol.structure import Structure
from azu.protocol.topology import Loss, Topology
from azu.registry.description import ModelDescription

log = logging.getLogger(__name__)

_PIPELINE_CONCURRENCY = 10_000
_LISTEN_S = 1.0


class PipelineSeat:
    """Starts a model's pipeline, and another one in its place when it dies.

    What a pipeline knows is in the jobs' token streams: its heir goes on from there.
    """

    def __init__(
        self, policy: NetworkPolicy, redis_url: str, structure: Structure, topology: Topology
    ) -> None:
        self._policy = policy
        self._redis_url = redis_url
        self._structure = structure
        self._topology = topology
        self._what = f"the pipeline of {structure.model_id}"
        self._change = asyncio.Condition()
        self._given_up: AzuError | None = None
        self.sitting: ActorHandle | None = None
        self.name = ""

    @property
    def actor(self) -> ActorHandle:
        """The pipeline that sits here; there is one after `start` and after `pause`."""
        assert self.sitting is not None, "nobody sits here"
        return self.sitting

    async def start(self) -> None:
        """Start a pipeline; it does nothing before `begin`."""
        registered = self._structure.model_id, self._structure.revision
        timeout_s = self._policy.timeouts.describe_s
        described: ModelDescription = await ask(REGISTRY, "describe", *registered, timeout_s=timeout_s)
        text_decoder: str = await ask(REGISTRY, "text_decoder", *registered, timeout_s=timeout_s)
        self.name = actor_name("pipeline", self._structure.model_id, self._topology.epoch)
        actor = start_on_head(
            Pipeline,
            self.name,
            self._structure,
            self._topology,
            SchedulerConfig(
                num_blocks=self._topology.num_blocks,
                block_size=self._topology.block_size,
                prefill_chunk_tokens=self._policy.engine.prefill_chunk_tokens,
                max_running=self._policy.engine.max_running,
            ),
            described.architecture.eos_token_ids,
            text_decoder,
            self._redis_url,
            self._policy.timeouts.step_s,
            max_concurrency=_PIPELINE_CONCURRENCY,
        )
        await self._seat(actor)

    async def begin(self, stages: Sequence[ActorHandle]) -> None:
        """Have the pipeline run steps through these stages."""
        await self._told(self.actor.start.remote(stages))

    async def adopt(self, name: str) -> None:
        """Take over a pipeline that somebody else started; one that is gone is replaced at the next pause."""
        self.name = name
        try:
            await self._seat(await asyncio.to_thread(find, name))
        except ValueError:
            log.warning("%s is gone", name)

    async def jobs(self) -> frozenset[str]:
        """Return the jobs that run here; nobody's when the pipeline is gone."""
        if self.sitting is None:
            return frozenset()
        try:
            jobs: frozenset[str] = await self._told(self.sitting.jobs.remote())
        except AzuError as error:
            log.warning("%s", error.message)
            return frozenset()
        return jobs

    async def run(self, job: Job) -> Ran:
        """Run a job in whoever sits here; raises WorkerLost once the model is given up."""
        while True:
            sitting = self.sitting
            try:
                if sitting is not None:
                    ran: Ran = await sitting.run.remote(job)
                    return ran
            except RayActorError:
                log.warning("%s died under %s", self._what, job.job_id)
            except Exception as error:
                raise as_azu_error(error, self._what) from error
            await self.another(sitting)

    async def another(self, than: ActorHandle | None) -> None:
        """Wait until somebody else sits here; raises WorkerLost once the model is given up."""
        async with self._change:
            await self._change.wait_for(lambda: self._given_up or self.sitting is not than)
        if self._given_up is not None:
            raise self._given_up

    async def cancel(self, job_id: str) -> None:
        """End a job's sequences; a pipeline that comes up later reads that its user gave it up."""
        try:
            if self.sitting is not None:
                await self.sitting.cancel.remote(job_id)
        except RayActorError:
            log.info("%s is gone: its heir will not run %s", self._what, job_id)

    async def limit(self, num_blocks: int) -> int:
        """Have no sequence taken that `num_blocks` would not hold; return how many are needed still."""
        return int(await self._told(self.actor.limit.remote(num_blocks)))

    async def pause(self) -> int:
        """Have the pipeline wait; one that is gone or hangs is replaced. Return its completed steps."""
        if self.sitting is not None:
            try:
                return int(await self._told(self.sitting.pause.remote()))
            except (WorkerLost, DeadlineExceeded) as error:
                log.warning("%s", error.message)
                ray.kill(self.sitting)
        await self.start()
        await self.begin(())
        return int(await self._told(self.actor.pause.remote()))

    async def resume(
        self,
        topology: Topology,
        stages: Sequence[ActorHandle],
        empty_stages: frozenset[int],
        *,
        is_repair: bool,
    ) -> None:
        """Have the pipeline fill the empty stages and go on."""
        self._topology = topology
        await self._told(self.actor.resume.remote(topology, stages, empty_stages, is_repair))

    async def next_loss(self) -> tuple[Loss, int, bool]:
        """Wait for what the stages report as lost, from which epoch, and whether for a bad frame.

        Raises an AzuError when the pipeline dies.
        """
        while True:
            if self.sitting is None:
                raise WorkerLost(f"{self._what} is gone")
            listening = self.sitting.next_loss.remote(_LISTEN_S)
            loss, epoch, bad_frame = await self._told(listening)
            if loss:
                return loss, epoch, bad_frame

    async def give_up(self, error: WorkerLost) -> None:
        """End everything that runs here with what it has."""
        self._given_up = error
        if self.sitting is not None:
            self.sitting.fail.remote(error)
        async with self._change:
            self._change.notify_all()

    def close(self) -> None:
        """Take the pipeline down."""
        if self.sitting is not None:
            ray.kill(self.sitting)

    async def _seat(self, actor: ActorHandle) -> None:
        self.sitting = actor
        async with self._change:
            self._change.notify_all()

    async def _told(self, asking: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(asking, self._policy.timeouts.step_s)
        except Exception as error:
            raise as_azu_error(error, self._what) from error
